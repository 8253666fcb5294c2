"""What a training step costs, known before any is made: operations, and bytes of memory by what they are for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multihead.runtime import optim
from multihead.runtime.device import autocast
from multihead.runtime.shadow import Watch

LIBRARY = 75_000_000
"""Bytes that any training adds to those of torch's import: our own modules, code of torch's kernels that is read in,
code that oneDNN writes. See benchmarks/memory.py."""
GAPS = 1.25
"""What a C library's allocator takes for so much of tensors. glibc looks for more than it hands out where a block is to
be aligned, so that a freed tensor seldom makes room for one of its own size: 1.0 to 1.6, see benchmarks/memory.py."""


@dataclass(frozen=True)
class Cost:
    """Of one step of training, in the loop's own order. Bytes, but for `parameters`, `flops` and `count`."""

    parameters: int
    trained: int
    weights: int
    """Parameters and buffers."""
    gradients: int
    optimizer: int
    average: int
    """The moving average of the weights."""
    activations: int
    """What the forward pass of the heaviest (micro-)batch keeps for the backward one."""
    peak: int
    """The most that is alive at once, all of the above and what comes and goes included."""
    flops: int
    """Of the matrix products of a step's forward and backward passes."""
    update_flops: int
    """Of those of the optimizer."""
    count: int
    """How many units (tokens, rows) the step's loss sums over."""
    batch: dict[str, tuple[int, ...]]
    parts: list[tuple[str, int, int]]
    """(name, parameters, bytes) of each part of the model; a shared weight counts where it stands first."""

    @property
    def needed(self) -> int:
        """Bytes that a process takes for it beyond those of torch itself."""
        return int(LIBRARY + GAPS * self.peak)

    @property
    def flops_per_unit(self) -> float:
        return self.flops / max(1, self.count)


def cost(
    make: Callable[[], nn.Module],
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    loss: Callable[[nn.Module, dict[str, Tensor]], Any],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    watch: Watch,
    precision: torch.dtype,
    device: torch.device | str = "cpu",
    clip: float | None = None,
    ema: float | None = None,
) -> Cost:
    """Two steps are made under `watch`: the first makes the optimizer's state, the second is counted.

    Args:
        make: the module; under a `Shadow` nothing is allocated for it.
        loss: → an object with `total` and `count`, as `multihead.task.Loss`.
        batches: one step's micro-batches, with their integers.
        watch: what counts.
    """
    device = torch.device(device)
    with watch.cast():
        with device:  # what is made is made there: moved weights would be new ones
            model = watch.weights(make()).train()
        steps = optimizer(model)
        average = optim.EMA(model, ema) if ema else None
        inputs = [{key: watch.input(value) for key, value in batch.items()} for batch in batches]
        one = _Step(watch, model, steps, average, loss, inputs, precision, device, clip)
        one.run()
        _complete(steps)
        watch.peak = watch.live
        found = one.run()
        parameters = list(model.parameters())
        return Cost(
            parameters=sum(p.numel() for p in parameters),
            trained=sum(p.numel() for p in parameters if p.requires_grad),
            weights=size_of([*parameters, *model.buffers()]),
            gradients=size_of([*watch.apart, *(p.grad for p in parameters)]),
            optimizer=size_of(x for state in steps.state.values() for x in state.values()),
            average=size_of(average.tensors().values()) if average else 0,
            peak=watch.peak,
            batch={key: tuple(value.shape) for key, value in batches[0].items()},
            parts=parts_of(model),
            **found,
        )


@dataclass
class _Step:
    """The loop's step."""

    watch: Watch
    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: optim.EMA | None
    loss: Callable[[nn.Module, Any], Any]
    batches: Sequence[dict[str, Tensor]]
    precision: torch.dtype
    device: torch.device
    clip: float | None

    def run(self) -> dict[str, int]:
        self.optimizer.zero_grad(set_to_none=True)
        self.watch.apart.clear()
        before, count, kept = self.watch.flops, 0, 0
        own = {t.untyped_storage()._cdata for t in (*self.model.parameters(), *self.model.buffers())}
        for batch in self.batches:
            with _saved(own) as saved, autocast(self.device, self.precision):
                loss = self.loss(self.model, batch)
            kept = max(kept, sum(saved.values()))
            loss.total.backward()
            count += int(loss.count)
        middle = self.watch.flops
        optim.clip(self.model.parameters(), self.clip, 1 / max(1, count))
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        return {"flops": middle - before, "update_flops": self.watch.flops - middle, "count": count,
                "activations": kept}  # fmt: skip


@contextlib.contextmanager
def _saved(own: set[int]) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps inside the block, but for those in `own`: address → bytes."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def _complete(optimizer: torch.optim.Optimizer) -> None:
    """The state of tables whose sparse gradients a shadow does not have."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if group.get("rowwise") and not optimizer.state[p]:
                optimizer.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def parts_of(model: nn.Module) -> list[tuple[str, int, int]]:
    """See `Cost.parts`."""
    seen: set[int] = set()
    found = []
    for name, part in model.named_children():
        own = [p for p in part.parameters() if id(p) not in seen]
        seen.update(map(id, own))
        found.append((name, sum(p.numel() for p in own), sum(p.numel() * p.element_size() for p in own)))
    return found


def size_of(tensors: Iterable[Any]) -> int:
    """Bytes of all tensors together, shared ones once."""
    dense = [part for t in tensors if isinstance(t, Tensor)
             for part in ((t._indices(), t._values()) if t.is_sparse else (t,))]  # fmt: skip
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in dense}.values())

