"""What a step costs, against closed forms; and of a model that no machine holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multihead.runtime import optim
from multihead.runtime.cost import Cost, cost
from multihead.runtime.shadow import Shadow
from multihead.task import Loss


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return optim.build(model, optimizer="adamw")


def of(model: nn.Module, x: Tensor, precision: torch.dtype = torch.float32) -> Cost:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        return Loss(model(batch["x"]).float().square().sum(), len(x))

    return cost(lambda: model, adamw, loss, [{"x": x}], watch=Shadow(), precision=precision)


def test_a_linear_layer() -> None:
    N, D, V = 64, 128, 512
    found = of(nn.Linear(D, V), torch.zeros(N, D))
    parameters = D * V + V
    assert found.parameters == found.trained == parameters
    assert (found.weights, found.gradients) == (4 * parameters, 4 * parameters)
    assert found.optimizer == 8 * parameters + 2 * 4  # two moments, and a step count of each of two weights
    # Forward N·D·V multiplications and additions, and as many for the weight's gradient; the input has none.
    assert found.flops == 2 * 2 * N * D * V and found.count == N
    # The square keeps the output, the layer its input.
    assert found.activations == 4 * (N * V + N * D)
    assert found.peak >= found.weights + found.gradients + found.optimizer


def test_attention_costs_what_the_formula_says() -> None:
    """Forward 2·2·B·H·T·S·E (Q Kᵀ, then A V); backward five products of that kind where forward has two."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x * self.scale, x, x, is_causal=True)

    B, H, T, E = 2, 4, 256, 32
    found = of(Attention(), torch.zeros(B, H, T, E))
    assert found.flops == (2 + 5) * 2 * B * H * T * T * E
    assert found.activations < 4 * B * H * T * T, "the scores are never held"


def test_what_autograd_keeps_in_each_number_format() -> None:
    """The input of each layer and the output; in bfloat16 also a copy of each weight but the first, whose input has no
    gradient to be worked out."""
    N, D, layers = 512, 256, 6
    wide, half = (of(nn.Sequential(*(nn.Linear(D, D) for _ in range(layers))), torch.zeros(N, D), number)
                  for number in (torch.float32, torch.bfloat16))  # fmt: skip
    assert half.flops == wide.flops == (2 * layers + layers - 1) * 2 * N * D * D
    assert wide.activations == 4 * (layers + 1) * N * D
    assert half.activations == 2 * layers * N * D + 4 * N * D + 2 * (layers - 1) * D * D


def test_a_model_that_fits_no_machine() -> None:
    found = cost(lambda: nn.Linear(1 << 20, 1 << 20), adamw, lambda model, batch: Loss(model(batch["x"]).sum(), 1),
                 [{"x": torch.zeros(1, 1 << 20)}], watch=Shadow(), precision=torch.bfloat16)  # fmt: skip
    assert found.weights > 4 << 40 and found.needed > 4 * found.weights
