"""How a crew trains one model: each process a copy of it (DDP), or each a share of its weights (FSDP2); and recompute.

The three engines answer the same calls, so that the loop knows none of them. Gradients are of sums: what comes out of
`Engine.reduce` times `Engine.scale` is their sum over all processes. Talk happens in the last micro-batch of a step.

Rajbhandari et al. 2020, "ZeRO"; Zhao et al. 2023, "PyTorch FSDP"; Chen et al. 2016, "Training Deep Nets with Sublinear
Memory Cost" (recompute).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError, tr
from ..transformer import noise
from ..transformer.trunk import Block, Trunk
from . import machine
from .crew import Crew

LARGE = 0.4
"""Share of a device's memory beyond which weights, gradients and Adam's averages of a whole model are too many."""
STATE = 16
"""Their bytes a parameter, in float32."""
HELD = 0.2
"""Share of it that the gradients of a whole model may take between the micro-batches of a step."""

Ask = Callable[[nn.Module, Any], Any]


class Asked(nn.Module):
    """A model and what is asked of it in training, as one module: its call is where torch's engines hook in."""

    def __init__(self, model: nn.Module, ask: Ask) -> None:
        super().__init__()
        self.model, self.ask = model, ask

    def forward(self, batch: Any) -> tuple[Tensor, Any, dict[str, Tensor]]:
        loss = self.ask(self.model, batch)
        return loss.total, loss.count, {name: value.detach() for name, value in loss.parts.items()}


class Engine:
    """One process, one whole model.

    Attributes:
        name: as ``train.parallel`` has it.
        scale: what gradients are still to be multiplied by to be sums over all processes.
    """

    name, scale = "none", 1.0

    def __init__(self, model: nn.Module, ask: Ask) -> None:
        self.asked = Asked(model, ask)

    def talking(self, last: bool) -> AbstractContextManager[None]:
        """Around loss and gradient of a micro-batch: whether gradients are to travel."""
        return contextlib.nullcontext()

    def reduce(self) -> None:
        """After the last one: what torch's engines left to us."""

    def whole(self) -> AbstractContextManager[None]:
        """While it lasts every process holds the whole model, to ask it what it likes without the others."""
        return contextlib.nullcontext()


class Copies(Engine):
    """A whole model in each process; gradients are averaged while they are still being worked out (DDP)."""

    name = "ddp"

    def __init__(self, model: nn.Module, ask: Ask, crew: Crew, device: torch.device) -> None:
        super().__init__(model, ask)
        self.scale = float(crew.world)
        self.apart, self.world = _tables(model), crew.world
        ddp = nn.parallel.DistributedDataParallel
        apart = [name for name, p in self.asked.named_parameters() if any(p is table for table in self.apart)]
        ddp._set_params_and_buffers_to_ignore_for_model(self.asked, apart)
        # What one batch does not reach (a rare kind of row) has no gradient there, and must not be waited for.
        self.ddp = ddp(self.asked, device_ids=[device] if device.type == "cuda" else None, forward_sync_buffers=False,
                       find_unused_parameters=True, gradient_as_bucket_view=True)  # fmt: skip
        self.asked = self.ddp  # type: ignore[assignment]

    def talking(self, last: bool) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if last else self.ddp.no_sync()

    def reduce(self) -> None:
        for table in self.apart:
            add_up(table, 1 / self.world)


class Shards(Engine):
    """Each process holds some rows of every weight, its gradient and its averages; a block is whole while it works
    (FSDP2). In bfloat16 the blocks travel and compute so; the sums of gradients, and the weights that are kept, are
    float32."""

    name = "fsdp"

    def __init__(self, model: nn.Module, ask: Ask, crew: Crew, device: torch.device, precision: torch.dtype) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        super().__init__(model, ask)
        self.apart = [*_tables(model), *(p for p in model.parameters() if p.dim() == 0)]  # a number has no rows
        for part in (*self.apart, *model.buffers()):
            part.data = part.data.to(device)
        marks = {name: dict(p.__dict__) for name, p in model.named_parameters(remove_duplicate=False)}
        mesh = init_device_mesh(device.type, (crew.world,))
        low = None if precision == torch.float32 else precision
        inside = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
        # What leaves a trunk meets weights in float32 again, and a norm wants both alike.
        at_end = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, output_dtype=torch.float32)
        ends = {id(trunk.blocks[-1]) for trunk in model.modules() if isinstance(trunk, Trunk)}
        outside = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks(model):
            if block.cross is not None:  # its keys and values are worked out before the block is called
                fully_shard(block.cross, mesh=mesh, mp_policy=inside)
                register_fsdp_forward_method(block.cross, "memory")
                register_fsdp_forward_method(block.cross, "over")
            fully_shard(block, mesh=mesh, mp_policy=at_end if low and id(block) in ends else inside)
        self.root: Any = fully_shard(self.asked, mesh=mesh, mp_policy=outside, ignored_params=set(self.apart))
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.__dict__.update(marks[name])  # what the optimizer reads there
        self.parts: list[Any] = [module for module in self.asked.modules() if isinstance(module, FSDPModule)]
        for part in self.parts:
            part.set_gradient_divide_factor(1.0)  # sums
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums
        self.root._get_fsdp_state()._lazy_init()  # else whichever part is called first takes itself for the root
        count = sum(p.numel() for p in model.parameters())
        self.hold = 4 * count <= HELD * _share(device, crew)

    @contextlib.contextmanager
    def talking(self, last: bool) -> Iterator[None]:
        # Between micro-batches either gradients wait whole, or each process keeps the sum of its own rows.
        self.root.set_requires_gradient_sync(last or not self.hold)
        yield

    def reduce(self) -> None:
        for table in self.apart:
            add_up(table, 1.0)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        for part in self.parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in self.parts:
                part.set_reshard_after_forward(part is not self.root, recurse=False)
            # Forgets which blocks were called meanwhile too: by that order the next gradients would be fetched ahead,
            # and the processes did not call them equally often.
            self.root.reset_iter_state()


def engine(
    model: nn.Module, ask: Ask, crew: Crew, device: torch.device, precision: torch.dtype, wish: str = "auto",
    fixed: bool = False,
) -> Engine:
    """The engine for `model`: by what the recipe wishes (``train.parallel``), else by its size.

    Args:
        ask: model and batch → `multihead.task.Loss`.
        fixed: some of the weights do not train (LoRA): then there is little to share out.
    """
    if crew.world == 1:
        return Engine(model.to(device), ask)
    if wish == "none":
        raise UserError(tr(
            f"train.parallel is none, but {crew.world} processes were started; write auto, ddp or fsdp, or start one",
            f"train.parallel 为 none，却启动了 {crew.world} 个进程；请写 auto、ddp 或 fsdp，或只启动一个进程"))
    if wish == "fsdp" and fixed:
        raise UserError(tr(
            "train.parallel=fsdp shares out weights that train, and with model.lora nearly none do; write ddp",
            "train.parallel=fsdp 用于分摊需训练的权重，而使用 model.lora 时几乎没有；请写 ddp"))
    count = sum(p.numel() for p in model.parameters())
    large = not fixed and STATE * count > LARGE * _share(device, crew)
    if wish == "fsdp" or (wish == "auto" and large):
        return Shards(model, ask, crew, device, precision)
    return Copies(model.to(device), ask, crew, device)


def _share(device: torch.device, crew: Crew) -> float:
    """Bytes a process may use on `device`: the GPU's, or its part of the machine's."""
    whole = machine.memory(device) or 16e9
    return whole if device.type == "cuda" else whole / crew.local_world


def blocks(model: nn.Module) -> list[Block]:
    """The blocks of every trunk."""
    found = (block for trunk in model.modules() if isinstance(trunk, Trunk) for block in trunk.blocks)
    return [block for block in found if isinstance(block, Block)]


# ---- recompute -----------------------------------------------------------------------------------------------------


def recompute(model: nn.Module) -> None:
    """Let every block forget what happens inside it, and work it out again for the gradient: the same numbers, the
    noise of dropout included, for about a third more time and the memory of one block instead of all."""
    for block in blocks(model):
        block.forward = _Twice(block.forward)  # type: ignore[method-assign, assignment]


class _Twice:
    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args)
        return checkpoint(self.forward, *args, use_reentrant=False, context_fn=noise.twice)


# ---- tables with sparse gradients ----------------------------------------------------------------------------------


def _tables(model: nn.Module) -> list[nn.Parameter]:
    """Weights of which a batch reaches few rows, with gradients of those rows alone: torch's engines know no such."""
    return [p for p in model.parameters()
            if p.requires_grad and (getattr(p, "rowwise", False) or getattr(p, "sgd", 0))]


def add_up(table: nn.Parameter, factor: float) -> None:
    """The table's gradient becomes `factor` times its sum over all processes, of which some may have none."""
    import torch.distributed as dist

    gradient = table.grad
    sparse_here = gradient is not None and gradient.is_sparse
    dense_here = gradient is not None and not gradient.is_sparse
    kind = torch.tensor([dense_here, sparse_here], dtype=torch.int64, device=table.device)
    dist.all_reduce(kind)
    dense, sparse = (bool(n) for n in kind.tolist())
    if dense:
        full = torch.zeros_like(table) if gradient is None else gradient.to_dense()
        dist.all_reduce(full)
        table.grad = full.mul_(factor)
    elif sparse:
        rows, values = _rows(table)
        parts = list(zip(_all(rows), _all(values), strict=True))
        index, value = (torch.cat(list(of)) for of in zip(*parts, strict=True))
        table.grad = torch.sparse_coo_tensor(
            index[None], value * factor, table.shape, check_invariants=False).coalesce()  # fmt: skip


def _rows(table: nn.Parameter) -> tuple[Tensor, Tensor]:
    if table.grad is None:
        return torch.zeros(0, dtype=torch.int64, device=table.device), table.detach()[:0]
    gradient = table.grad.coalesce()
    return gradient.indices()[0], gradient.values()


def _all(mine: Tensor) -> Sequence[Tensor]:
    """Every process's tensor, alike but for the first axis, in order."""
    import torch.distributed as dist

    size = torch.tensor([len(mine)], device=mine.device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    longest = max(int(n) for n in sizes)
    padded = torch.cat((mine, mine.new_zeros(longest - len(mine), *mine.shape[1:])))
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded)
    return [piece[: int(n)] for piece, n in zip(found, sizes, strict=True)]
