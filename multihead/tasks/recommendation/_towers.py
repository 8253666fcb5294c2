"""The network of two-tower-retrieval: users and items as vectors of length 1 in one space.

Both towers are readings of one causal trunk. An item is its id, its fields, the tokens of its texts and one that closes
the list, and its vector the mean of what the trunk makes of them; a user is an id, fields, texts and a token that opens
the history, and from there on every place of the history is a reading: what the user is like with so much of it known.

Legend: B users, T items of a history, S tokens of a description, P = S + 1 tokens before the history, N items asked
for, I items of the catalogue, D d_model.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multihead.codec.sides import Side
from multihead.tasks.recommendation._fields import FieldTable
from multihead.transformer.config import TransformerConfig
from multihead.transformer.dropout import Dropout
from multihead.transformer.trunk import Trunk

COLDEST, WARMEST = 0.01, 1.0
"""Bounds of the learned temperature."""


class Description(nn.Module):
    """Numbers of users or items → tokens: the id's, one a field, one a token of text; and the token that closes them.

    Args:
        side: what is known of each.
        hidden: in training, the share of ids that are read as unknown, so that a vector can be made without one
            (Volkovs et al. 2017, "DropoutNet").
    """

    side_words: Tensor
    side_words_lengths: Tensor
    side_quantity: Tensor

    def __init__(self, side: Side, config: TransformerConfig, hidden: float) -> None:
        super().__init__()
        std, width = config.d_model**-0.5, config.d_model
        self.met, self.hidden = side.met, hidden
        self.id = nn.Embedding(side.met + 1, width)
        nn.init.normal_(self.id.weight, std=std)
        self.fields = FieldTable(side.fields, width, std) if side.fields is not None else None
        self.word = nn.Embedding(side.text.vocab_size, width) if side.text is not None else None
        if self.word is not None:
            nn.init.normal_(self.word.weight, std=std)
        self.count = 1 + (len(side.fields.used) if side.fields is not None else 0)
        self.place = nn.Parameter(torch.randn(self.count + (self.word is not None), width) * std)
        self.end = nn.Parameter(torch.randn(width) * std)
        self.dropout = Dropout(config.dropout)
        for name, array in side.arrays.items():
            self.register_buffer(f"side_{name}", array, persistent=False)

    @property
    def length(self) -> int:
        """Tokens of a description, the closing one included."""
        return self.count + 1 + (self.side_words.shape[1] if self.word is not None else 0)

    def hide(self, number_N: Tensor) -> Tensor:
        """(N,) which ids are read as unknown: a share in training, and always those that training never met."""
        hidden_N = number_N >= self.met
        if self.training and self.hidden:
            hidden_N = hidden_N | (torch.rand(number_N.shape, device=number_N.device) < self.hidden)
        return hidden_N

    def plain(self, number_N: Tensor, hidden_N: Tensor) -> Tensor:
        """Id and fields, (N, count, D)."""
        found = [self.id(torch.where(hidden_N, self.met, number_N))[:, None]]
        if self.fields is not None:
            held = (getattr(self, f"side_{name}")[number_N] for name in ("one", "several", "several_lengths"))
            one, several, lengths = (t.long() for t in held)
            found.append(self.fields(one, several, lengths, self.side_quantity[number_N]))
        return torch.cat(found, 1) + self.place[: self.count]

    def forward(self, number_N: Tensor, hidden_N: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Tokens (N, S + 1, D), which of them are real (None: all), and id with fields as one vector (N, D)."""
        plain_NCD = self.plain(number_N, hidden_N)
        parts, real = [plain_NCD], None
        if self.word is not None:
            words_NL, lengths_N = self.side_words[number_N].long(), self.side_words_lengths[number_N]
            parts.append(self.word(words_NL) + self.place[-1])
            real_NL = torch.arange(words_NL.shape[1], device=words_NL.device) < lengths_N[:, None]
            real = F.pad(real_NL, (self.count, 1), value=True)
        parts.append(self.end.expand(len(number_N), 1, -1))
        return self.dropout(torch.cat(parts, 1)), real, plain_NCD.sum(1) / math.sqrt(self.count)


class TwoTower(nn.Module):
    """Users and items in one space; see the module.

    Args:
        temperature: cosines are divided by it to be compared; learned from there on where `learned`.
        hidden: shares of users' and of items' ids that are hidden in training.
        counts: (I,) how often each item was chosen; 0 for those nobody chose.
    """

    temperature: Tensor
    fame_I: Tensor

    def __init__(
        self, config: TransformerConfig, users: Side, items: Side, temperature: float, learned: bool,
        hidden: tuple[float, float], counts: Tensor,
    ) -> None:
        super().__init__()
        self.user, self.item = Description(users, config, hidden[0]), Description(items, config, hidden[1])
        self.trunk = Trunk(config, causal=True)
        self.user_out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.item_out = nn.Linear(config.d_model, config.d_model, bias=False)
        # How popular an item is moves its vector along one direction, to which every user's vector leans: what all
        # choose is known from the first step on, and need not be learned item by item.
        self.fame = nn.Parameter(torch.randn(config.d_model) * 3**-0.5)
        log_I = counts.clamp(min=1).float().log()
        met = log_I[: items.met]
        fame_I = torch.where(counts > 0, (log_I - met.mean()) / met.std().clamp(min=1e-3), 0.0)
        self.register_buffer("fame_I", fame_I, persistent=False)
        start = torch.tensor(math.log(temperature))
        self.log_temperature = nn.Parameter(start) if learned else None
        self.register_buffer("temperature", start.exp(), persistent=False)
        self.items, self.reader = len(items), None  # type: int, Any
        self._kept: tuple[int, Tensor] | None = None

    def warmth(self) -> Tensor:
        """The temperature."""
        if self.log_temperature is None:
            return self.temperature
        return self.log_temperature.exp().clamp(COLDEST, WARMEST)

    def item_tower(self, number_N: Tensor) -> tuple[Tensor, Tensor]:
        """Items → vectors of length 1, (N, D); and how each stands in a history, (N, D)."""
        hidden_N = self.item.hide(number_N)
        x_NSD, real_NS, plain_ND = self.item(number_N, hidden_N)
        y_NSD = self.trunk(x_NSD, mask=real_NS)
        # The mean of all tokens, not the closing one's reading alone: an item's own vector has a straight way out.
        if real_NS is None:
            y_ND = y_NSD.mean(1)
        else:
            y_ND = (y_NSD * real_NS[..., None]).sum(1) / real_NS.sum(1, keepdim=True)
        fame_N1 = (self.fame_I[number_N] * ~hidden_N)[:, None]
        return F.normalize((self.item_out(y_ND) + fame_N1 * self.fame).float(), dim=-1), plain_ND

    def user_tower(self, user_B: Tensor, history_BTD: Tensor) -> Tensor:
        """Vectors of length 1 of users who chose the first 0 … T items of their histories: (B, T + 1, D)."""
        x_BPD, real_BP, _ = self.user(user_B, self.user.hide(user_B))
        x_BXD = torch.cat((x_BPD, self.item.dropout(history_BTD)), 1)
        mask = None if real_BP is None else F.pad(real_BP, (0, history_BTD.shape[1]), value=True)
        y_BTD = self.trunk(x_BXD, mask=mask)[:, x_BPD.shape[1] - 1 :]
        return F.normalize((self.user_out(y_BTD) + self.fame).float(), dim=-1)

    def all_items(self) -> Tensor:
        """(I, D) every item's vector, kept for as long as the weights stay and nothing is learned."""
        # Weights made in inference mode count no versions: nothing learns there.
        version = sum(0 if p.is_inference() else p._version for p in self.parameters())
        keeps = not (torch.is_grad_enabled() or self.training)
        if keeps and self._kept is not None and self._kept[0] == version:
            return self._kept[1]
        number_I = torch.arange(self.items, device=self.item.end.device)
        found = torch.cat([self.item_tower(part)[0] for part in number_I.split(4096)])
        if keeps:
            self._kept = version, found
        return found

    def users(self, user_B: Tensor, recent_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """(B, D) vectors of users by what they chose last, the histories padded on the right."""
        unique_U, where_BT = recent_BT.unique(return_inverse=True)
        history_BTD = self.history(unique_U)[where_BT]
        x_BTD = self.user_tower(user_B, history_BTD)
        return x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), lengths_B]

    def history(self, number_N: Tensor) -> Tensor:
        """How items stand in a history, (N, D)."""
        plain_NCD = self.item.plain(number_N, self.item.hide(number_N))
        return plain_NCD.sum(1) / math.sqrt(self.item.count)

    @torch.no_grad()
    def embed_user(self, ids: Any) -> Tensor:
        """Vectors of length 1 of users by their ids, (B, D); of one id, (D,). A dict is a request: {"user", "history"}.

        Of an id that was never met nothing is known; the vector is then that of any newcomer.
        """
        return self.reader.embed_user(self, ids)

    @torch.no_grad()
    def embed_item(self, ids: Any) -> Tensor:
        """Vectors of length 1 of items by their ids, (N, D); of one id, (D,). The dot product with a user's vector says
        how well they suit.

        Raises:
            UserError: naming the ids that the catalogue does not have.
        """
        return self.reader.embed_item(self, ids)
