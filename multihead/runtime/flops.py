"""Floating-point operations of torch code: those of its matrix products and convolutions, call by call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def flops_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """Floating-point operations of one call of a torch operator: of its matrix products and convolutions."""
    packet = func._overloadpacket
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:  # torch counts its kernels for GPUs alone
        return int(sdpa_flop_count(*(x.shape for x in args[:3])))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*(x.shape for x in args[:4])))
    if hasattr(torch.ops.mkldnn, "_linear_pointwise") and packet is torch.ops.mkldnn._linear_pointwise:
        return 2 * int(out.numel()) * int(args[0].shape[-1])
    counted = flop_registry.get(packet)
    return int(counted(*args, **kwargs, out_val=out)) if counted is not None else 0


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.flops += flops_of(func, args, kwargs or {}, out)
        return out


def forward_flops(work: Callable[[], Any]) -> int:
    """Operations of `work`, which is run once, without gradients; torch's generators stay where they were."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _Counter() as counter:
        work()
    return counter.flops
