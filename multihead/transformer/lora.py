"""Low-rank adaptation: weights stay as they are, and two small matrices beside each of them learn (Hu et al. 2021,
"LoRA: Low-Rank Adaptation of Large Language Models", section 4.1).

Legend: I inputs of a linear map, O its outputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multihead.transformer.dropout import Dropout

TARGETS = {"attention": ("attention", "cross"), "feed_forward": ("feed_forward",)}
"""What a recipe calls the linear maps of a trunk, and the parts of a block that hold them."""


class LoraLinear(nn.Linear):
    """A linear map W that is frozen, plus alpha/R · B A with A (R, I) and B (O, R): (…, I) → (…, O).

    A starts at random and B at zero, so that at first nothing changes. `dropout` is on the input of A alone.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale, self.drop = alpha / rank, Dropout(dropout)
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as the authors' own code and PEFT's
        for small in (self.lora_A, self.lora_B):
            small.muon_split = 0  # type: ignore[attr-defined]  # to AdamW: an orthogonal step undoes B's start at zero
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        added = F.linear(F.linear(self.drop(x), self.lora_A), self.lora_B)
        return F.linear(x, self.weight, self.bias) + self.scale * added

    def merged(self) -> Tensor:
        """The one weight (O, I) that gives the same outputs."""
        with torch.no_grad():
            return self.weight + self.scale * (self.lora_B @ self.lora_A)


def adapt(trunk: nn.Module, rank: int, alpha: float, dropout: float, targets: Iterable[str]) -> None:
    """Put LoRA beside the linear maps of `trunk` that `targets` names: "attention", "feed_forward" or "all".

    Nothing is frozen by this: see `freeze`.
    """
    chosen = set(targets)
    parts = {part for name, held in TARGETS.items() if {name, "all"} & chosen for part in held}
    for name, module in list(trunk.named_modules()):
        if isinstance(module, nn.Linear) and parts & set(name.split(".")):
            above, _, own = name.rpartition(".")
            setattr(trunk.get_submodule(above), own, LoraLinear(module, rank, alpha, dropout))


def freeze(*parts: nn.Module) -> None:
    """Let nothing of `parts` train but what `adapt` put there."""
    for part in parts:
        for name, parameter in part.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[2] in ("lora_A", "lora_B"))


def adapted(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Every linear map with LoRA beside it, by name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def merged(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` of `model` by name, as those of a model without LoRA that gives the same outputs."""
    plain = dict(tensors)
    for name, module in adapted(model):
        del plain[f"{name}.lora_A"], plain[f"{name}.lora_B"]
        plain[f"{name}.weight"] = module.merged()
    return plain
