"""The model of speech synthesis: tokens → what each sounds like and for how long → frames.

Legend: B texts, S tokens, T frames, G frames that lie side by side in one vector, M mel bands, D d_model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multihead.tasks.speech._alignment import spread
from multihead.transformer.config import TransformerConfig
from multihead.transformer.dropout import dropout
from multihead.transformer.inputs import TokenInput
from multihead.transformer.times import TimeInput
from multihead.transformer.trunk import Trunk

PLACES = 4


class Said(NamedTuple):
    """What a text is to sound like."""

    states: Tensor
    """(B, S, D)."""
    mean: Tensor
    """(B, S, M): each token's mean frame."""
    log_durations: Tensor
    """(B, S): natural logarithm of the frames each token is to last."""


class Durations(nn.Module):
    """How long tokens last: two convolutions over neighbours, each with ReLU and LayerNorm, and a linear map (Ren et
    al. 2021, "FastSpeech 2", section 2.3): (B, S, D) → (B, S), natural logarithms of frames."""

    def __init__(self, d_model: int, dropout: float) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv1d(d_model, d_model, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(2))
        self.out = nn.Linear(d_model, 1)
        self.dropout = dropout
        nn.init.normal_(self.out.weight, std=0.1 * d_model**-0.5)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_BSD: Tensor, real_BS: Tensor) -> Tensor:
        for convolution, norm in zip((self.first, self.second), self.norms, strict=True):
            x_BSD = convolution((x_BSD * real_BS[..., None]).mT).mT
            x_BSD = dropout(norm(F.relu(x_BSD)), self.dropout, self.training)
        return self.out(x_BSD)[..., 0].float()


class Synthesiser(nn.Module):
    """Two trunks: one reads a text's tokens, the other makes frames of what it read, stretched to their length.

    A token's vector says what its mean frame is (that is what alignments are found by) and, to a small predictor, how
    long it lasts. The second trunk sees, for each frame, its token's vector and mean, and where in the token it lies;
    as a flow it also sees the frame on its way from noise, and the time, and says its velocity.

    Args:
        vocabulary: of tokens; voices: how many there are to choose from; 1 has no vector of its own.
        group: G.
        flows: whether frames are made by flow matching; else in one go.
    """

    def __init__(self, config: TransformerConfig, mels: int, vocabulary: int, voices: int, text_layers: int, group: int,
                 flows: bool) -> None:
        super().__init__()
        self.config, self.mels, self.group, self.flows = config, mels, group, flows
        reading, size = replace(config, num_layers=text_layers), config.d_model
        self.input, self.encoder = TokenInput(reading, vocabulary), Trunk(reading)
        self.voice = nn.Embedding(voices, size) if voices > 1 else None
        self.mean, self.durations = nn.Linear(size, mels), Durations(size, config.dropout)
        self.place = nn.Linear(PLACES, size)
        self.frames = nn.Linear((2 if flows else 1) * mels * group, size)
        self.time = TimeInput(size) if flows else None
        self.decoder = Trunk(config, conditioned=flows)
        self.head = nn.Linear(size, mels * group)
        for linear, scale in ((self.mean, 0.1), (self.place, 1.0), (self.frames, 1.0), (self.head, 0.1)):
            nn.init.normal_(linear.weight, std=scale * linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        self.vocoder: nn.Module | None = None
        if self.voice is not None:
            nn.init.normal_(self.voice.weight, std=size**-0.5)

    @property
    def trunk(self) -> Trunk:
        return self.decoder

    def read(self, ids_BS: Tensor, real_BS: Tensor, voice_B: Tensor) -> Said:
        """Texts (B, S) in the voices number (B,)."""
        x_BSD = self.input(ids_BS)
        if self.voice is not None:
            x_BSD = x_BSD + self.voice(voice_B)[:, None]
        states_BSD = self.encoder(x_BSD, mask=None if bool(real_BS.all()) else real_BS)
        # What is hard to time must not bend what is said: the predictor learns from vectors, not they from it.
        return Said(states_BSD, self.mean(states_BSD).float(), self.durations(states_BSD.detach(), real_BS))

    def stretched(self, said: Said, durations_BS: Tensor, T: int) -> tuple[Tensor, Tensor]:
        """Each of T frames' token's mean (B, T, M), and its vector with the frame's place in it, (B, T / G, D).

        Args:
            durations_BS: frames of each token.
            T: a multiple of G.
        """
        token_BT = spread(durations_BS, T)
        long_BT = durations_BS.gather(1, token_BT).clamp(min=1)
        since_BT = torch.arange(T, device=token_BT.device) - (durations_BS.cumsum(1) - durations_BS).gather(1, token_BT)
        places_BTP = torch.stack(((since_BT + 0.5) / long_BT, long_BT.float().log(), since_BT / 8.0,
                                  (long_BT - since_BT) / 8.0), dim=-1).clamp(-4, 4)
        states_BTD = said.states.gather(1, token_BT[..., None].expand(-1, -1, said.states.shape[2]))
        mean_BTM = said.mean.gather(1, token_BT[..., None].expand(-1, -1, self.mels))
        held_BTD = states_BTD + self.place(places_BTP)
        return mean_BTM, held_BTD.unflatten(1, (-1, self.group)).mean(2)

    def forward(self, mean_BTM: Tensor, held_BUD: Tensor, real_BT: Tensor, x_BTM: Tensor | None = None,
                t_B: Tensor | None = None) -> Tensor:
        """What `stretched` gave → frames (B, T, M), or, as a flow, the velocity of `x_BTM` at times `t_B`."""
        seen_BTX = mean_BTM if x_BTM is None else torch.cat((mean_BTM, x_BTM), dim=2)
        x_BUD = held_BUD + self.frames(seen_BTX.unflatten(1, (-1, self.group)).flatten(2))
        condition = None if self.time is None or t_B is None else self.time(t_B)
        real_BU = real_BT[:, :: self.group]
        y_BUD = self.decoder(x_BUD, mask=None if bool(real_BU.all()) else real_BU, condition=condition)
        y_BTM = self.head(y_BUD).float().unflatten(2, (self.group, self.mels)).flatten(1, 2)
        return y_BTM if self.flows else mean_BTM + y_BTM


def whole_frames(log_durations_S: Tensor, speed: float) -> Tensor:
    """Predicted lengths as whole frames (S,): ends are rounded, not lengths, so that no error adds up."""
    ends_S = (log_durations_S.clamp(-2, 6).exp().cumsum(0) / speed).round().long()
    return torch.diff(ends_S, prepend=ends_S.new_zeros(1))
