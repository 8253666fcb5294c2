"""Tensors of which every process holds some rows (torch's DTensor): taken apart, put together, filled.

Everything here also takes plain tensors, and gives them back as they are, so that what is done to weights, gradients
and averages is written once. `whole` is a collective: every process of the run must call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "device_mesh")  # asked so, a run on one process never imports torch.distributed.tensor


def local(tensor: Tensor) -> Tensor:
    """The rows of it that are here: the same memory. There may be none."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def locals_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [local(tensor) for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """All rows, from every process."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def like(rows: Tensor, model: Tensor) -> Tensor:
    """The rows that are here, as the tensor that all processes together hold in the way they hold `model`."""
    if not is_sharded(model):
        return rows
    from torch.distributed.tensor import DTensor

    placed: Any = model
    return DTensor.from_local(
        rows, placed.device_mesh, placed.placements, run_check=False, shape=placed.shape, stride=placed.stride()
    )


def share(full: Tensor, model: Tensor) -> Tensor:
    """Of a whole tensor what this process is to hold, in the way it holds `model`. Nothing is sent."""
    if not is_sharded(model):
        return full
    from torch.distributed.tensor import distribute_tensor

    placed: Any = model
    return distribute_tensor(full, placed.device_mesh, placed.placements, src_data_rank=None)


@torch.no_grad()
def fill(tensor: Tensor, full: Tensor) -> None:
    """Copy a whole tensor into one that may be shared out."""
    local(tensor).copy_(local(share(full, tensor)))


def norm(gradients: Sequence[Tensor]) -> Tensor:
    """The joint 2-norm of gradients, a tensor (): of every process's rows together where they are shared out."""
    held = [gradient for gradient in gradients if is_sharded(gradient)]
    if not held:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients))))
    import torch.distributed as dist

    square = torch.stack(torch._foreach_norm(locals_of(held))).double().square().sum()
    dist.all_reduce(square, group=held[0].device_mesh.get_group())  # type: ignore[attr-defined]
    plain = [gradient for gradient in gradients if not is_sharded(gradient)]
    if plain:
        square += torch.stack(torch._foreach_norm(plain)).double().square().sum()
    return square.sqrt().float()
