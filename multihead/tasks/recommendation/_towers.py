"""The network of two-tower-retrieval: users and items as vectors of length 1 in one space.

Both towers are readings of one causal trunk. An item is its id, its fields, the tokens of its texts and one that closes
the list, and its vector the mean of what the trunk makes of them; a user is an id, fields, texts and a token that opens
the history, and from there on every place of the history is a reading: what the user is like with so much of it known.
Beside it may stand what the log says at once (`tastes`): items chosen by the same users lie together from the first
step on, and a user is where the items of the history lie.

Legend: B users, T items of a history, S tokens of a description, P = S + 1 tokens before the history, N items asked
for, I items of the catalogue, D d_model, R width of tastes, E = D + R, A interactions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multihead.codec.sides import Side
from multihead.tasks.recommendation._fields import FieldTable
from multihead.transformer import noise
from multihead.transformer.config import TransformerConfig
from multihead.transformer.dropout import Dropout
from multihead.transformer.trunk import Trunk

COLDEST, WARMEST = 0.01, 1.0
"""Bounds of the learned temperature."""
QUIET, FAME = 0.05, 0.13
"""With tastes, how loud the fresh weights of the ways out and of popularity are: tastes lead at first."""
SPARE, ROUNDS = 8, 4
"""Further directions, and rounds of power iteration, of the randomised decomposition."""


def tastes(user_A: Tensor, item_A: Tensor, items: int, width: int) -> Tensor:
    """(items, width) vectors of length 1: what users chose, seen in few directions (PureSVD, Cremonesi et al. 2010).

    The matrix of users × items has a 1 / (√ of the user's items · ⁴√ of the item's users) where one chose the other;
    its right singular vectors are found by a randomised decomposition (Halko et al. 2011). An item chosen by nobody, or
    a direction that there is not, is 0.
    """
    users = int(user_A.max()) + 1 if len(user_A) else 0
    pair_2A = torch.stack((user_A, item_A)).long().unique(dim=1)
    of_user, of_item = (torch.bincount(one, minlength=n).clamp(min=1).float()
                        for one, n in zip(pair_2A, (users, items), strict=True))  # fmt: skip
    value_A = of_user[pair_2A[0]] ** -0.5 * of_item[pair_2A[1]] ** -0.25
    matrix = torch.sparse_coo_tensor(pair_2A, value_A, (users, items), check_invariants=False)
    most = min(users, items)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found_IR = torch.svd_lowrank(matrix, min(width + SPARE, most), ROUNDS)[2][:, : min(width, most)]
    found_IR = found_IR * (torch.bincount(pair_2A[1], minlength=items) > 0)[:, None]  # what is left there is noise
    return F.pad(F.normalize(found_IR, dim=1), (0, width - found_IR.shape[1]))


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
            where = number_N.device
            drawn_N = torch.rand(number_N.shape, device=where, generator=noise.generator(where))
            hidden_N = hidden_N | (drawn_N < self.hidden)
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
        taste: (met, R) what `tastes` found of the items that training met; None: nothing.
    """

    temperature: Tensor
    fame_I: Tensor
    taste_IR: Tensor

    def __init__(
        self, config: TransformerConfig, users: Side, items: Side, temperature: float, learned: bool,
        hidden: tuple[float, float], counts: Tensor, taste: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.user, self.item = Description(users, config, hidden[0]), Description(items, config, hidden[1])
        self.trunk = Trunk(config, causal=True)
        taste = torch.zeros(items.met, 0) if taste is None else taste
        self.register_buffer("taste_IR", F.pad(taste, (0, 0, 0, 1)), persistent=False)  # the last is an unknown item's
        self.width = config.d_model + taste.shape[1]
        self.user_out = nn.Linear(config.d_model, self.width, bias=False)
        self.item_out = nn.Linear(config.d_model, self.width, bias=False)
        # How popular an item is moves its vector along one direction, to which every user's vector leans: what all
        # choose is known from the first step on, and need not be learned item by item.
        self.fame = nn.Parameter(torch.randn(config.d_model) * 3**-0.5)
        self.turn = nn.Parameter(torch.eye(taste.shape[1])) if taste.shape[1] else None
        if self.turn is not None:
            for weight, scale in ((self.user_out.weight, QUIET), (self.item_out.weight, QUIET), (self.fame, FAME)):
                weight.data.mul_(scale)
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

    def _tasted(self, y: Tensor, fame: Tensor, taste: Tensor) -> Tensor:
        """(…, E) of length 1: a way out of the trunk, with what is known of popularity and tastes."""
        known = fame if self.turn is None else torch.cat((fame, taste @ self.turn), -1)
        return F.normalize((y + known).float(), dim=-1)

    def _taste(self, number_N: Tensor, hidden_N: Tensor) -> Tensor:
        return self.taste_IR[torch.where(hidden_N, len(self.taste_IR) - 1, number_N)]

    def item_tower(self, number_N: Tensor) -> tuple[Tensor, Tensor]:
        """Items → vectors of length 1, (N, E); and how each stands in a history, (N, E)."""
        hidden_N = self.item.hide(number_N)
        x_NSD, real_NS, plain_ND = self.item(number_N, hidden_N)
        y_NSD = self.trunk(x_NSD, mask=real_NS)
        # The mean of all tokens, not the closing one's reading alone: an item's own vector has a straight way out.
        if real_NS is None:
            y_ND = y_NSD.mean(1)
        else:
            y_ND = (y_NSD * real_NS[..., None]).sum(1) / real_NS.sum(1, keepdim=True)
        fame_N1 = (self.fame_I[number_N] * ~hidden_N)[:, None]
        taste_NR = self._taste(number_N, hidden_N)
        return self._tasted(self.item_out(y_ND), fame_N1 * self.fame, taste_NR), torch.cat((plain_ND, taste_NR), 1)

    def user_tower(self, user_B: Tensor, history_BTE: Tensor) -> Tensor:
        """Vectors of length 1 of users who chose the first 0 … T items of their histories: (B, T + 1, E)."""
        depth = self.fame.shape[0]
        history_BTD, taste_BTR = history_BTE.split((depth, self.width - depth), -1)
        x_BPD, real_BP, _ = self.user(user_B, self.user.hide(user_B))
        x_BXD = torch.cat((x_BPD, self.item.dropout(history_BTD)), 1)
        mask = None if real_BP is None else F.pad(real_BP, (0, history_BTD.shape[1]), value=True)
        y_BTD = self.trunk(x_BXD, mask=mask)[:, x_BPD.shape[1] - 1 :]
        taste_BTR = F.normalize(F.pad(taste_BTR.cumsum(1), (0, 0, 1, 0)), dim=-1)
        return self._tasted(self.user_out(y_BTD), self.fame.expand(*y_BTD.shape[:2], -1), taste_BTR)

    def all_items(self) -> Tensor:
        """(I, E) every item's vector, kept for as long as the weights stay and nothing is learned."""
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
        """(B, E) vectors of users by what they chose last, the histories padded on the right."""
        unique_U, where_BT = recent_BT.unique(return_inverse=True)
        x_BTE = self.user_tower(user_B, self.history(unique_U)[where_BT])
        return x_BTE[torch.arange(len(x_BTE), device=x_BTE.device), lengths_B]

    def history(self, number_N: Tensor) -> Tensor:
        """How items stand in a history, (N, E)."""
        hidden_N = self.item.hide(number_N)
        plain_NCD = self.item.plain(number_N, hidden_N)
        return torch.cat((plain_NCD.sum(1) / math.sqrt(self.item.count), self._taste(number_N, hidden_N)), 1)

    @torch.no_grad()
    def embed_user(self, ids: Any) -> Tensor:
        """Vectors of length 1 of users by their ids, (B, E); of one id, (E,). A dict is a request: {"user", "history"}.

        Of an id that was never met nothing is known; the vector is then that of any newcomer.
        """
        return self.reader.embed_user(self, ids)

    @torch.no_grad()
    def embed_item(self, ids: Any) -> Tensor:
        """Vectors of length 1 of items by their ids, (N, E); of one id, (E,). The dot product with a user's vector says
        how well they suit.

        Raises:
            UserError: naming the ids that the catalogue does not have.
        """
        return self.reader.embed_item(self, ids)
