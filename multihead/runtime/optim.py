"""The optimizer, its schedule, gradient clipping, and the moving average of the weights.

One ``torch.optim.Optimizer`` holds two kinds of groups: Muon for the trunk's matrices, AdamW for everything else
(embeddings, norms, biases, heads), so that there is one state to save. Each step is a few calls on lists and batches of
tensors and none a weight, for a small model on a CPU spends its time between the calls.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ..transformer.trunk import Trunk
from .device import fast_bf16
from .sharding import fill, is_sharded, like, local, locals_of, norm, share, whole

# Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024): the steepest slope at zero.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sends each matrix U S Vᵀ close to U Vᵀ by Newton–Schulz iterations: (N, R, C) → (N, R, C), of type `dtype`.

    With the quintic's coefficients the singular values land between about 0.7 and 1.2 rather than at 1, which Muon does
    not mind (Jordan 2024). Works on the shorter side, all N matrices at once.
    """
    a, b, c = QUINTIC
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype).contiguous()
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


class MuonAdamW(torch.optim.Optimizer):
    """Groups with ``muon: True`` follow Muon (2-D weights only), the others AdamW (Loshchilov & Hutter 2019).

    Group keys: ``lr weight_decay`` and, for Muon, ``momentum steps match_rms``; for AdamW, ``betas eps``.
    Muon here is Nesterov momentum, then `orthogonalize`, then a step of lr·√max(1, R/C) (Jordan 2024), or of
    lr·0.2·√max(R, C) with ``match_rms``: the size of AdamW's steps, so that its learning rate serves for both (Liu et
    al. 2025, arXiv 2502.16982, section 2.2). A weight with an attribute ``muon_split = n`` is n matrices stacked by
    rows, each orthogonalized alone. Groups with ``rowwise: True`` hold large tables: Adam moves the rows that the batch
    looked up and no others, as torch's SparseAdam does. Groups with ``sgd: True`` move by lr times the gradient alone,
    and only the rows it reaches: what is seldom looked up moves seldom and little, where Adam would move it as far as
    anything else and learn it by heart.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        defaults = {"lr": 1e-3, "weight_decay": 0.0, "muon": False, "rowwise": False, "sgd": False,
                    "momentum": 0.95, "steps": 5, "match_rms": False, "betas": (0.9, 0.95), "eps": 1e-8}  # fmt: skip
        super().__init__(groups, defaults)
        for group in self.param_groups:
            # Read by torch's load_state_dict: a fused kernel wants its step count on the weights' device.
            group["fused"] = not (group["muon"] or group["rowwise"] or group["sgd"])
            for parameter in group["params"] if group["muon"] else ():
                shape, parts = tuple(parameter.shape), _split(parameter)
                if len(shape) != 2 or shape[0] % parts:
                    raise ValueError(f"Muon takes matrices of equal blocks, not {shape} in {parts}")

    # torch wraps these four for its compiler, and the wrapper imports all of it (two seconds) at the first call. We
    # compile models, never optimizers.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on every parameter that has a gradient."""
        for group in self.param_groups:
            live = [parameter for parameter in group["params"] if parameter.grad is not None]
            if live:
                kind = next((name for name in ("muon", "rowwise", "sgd") if group[name]), "adamw")
                getattr(self, f"_{kind}")(group, live)

    def _muon(self, group: dict[str, Any], live: list[Tensor]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        for parameter in live:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        averages = locals_of(self.state[parameter]["momentum"] for parameter in live)
        gradients = locals_of(parameter.grad for parameter in live if parameter.grad is not None)
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, averages, momentum)
        if group["weight_decay"]:
            torch._foreach_mul_(locals_of(live), 1 - lr * group["weight_decay"])
        # A matrix of which each process holds some rows moves as a whole: all work out the same step.
        updates = [whole(like(update, parameter)) for update, parameter in zip(ahead, live, strict=True)]
        moved = [torch.zeros_like(u) if is_sharded(p) else p for u, p in zip(updates, live, strict=True)]
        alike: dict[tuple, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter, into, update in zip(live, moved, updates, strict=True):
            parts = _split(parameter)
            blocks = zip(into.chunk(parts), update.chunk(parts), strict=True)
            alike[(parameter.shape[0] // parts, parameter.shape[1], parameter.device, parameter.dtype)].extend(blocks)
        for (rows, columns, device, dtype), pairs in alike.items():
            targets, moves = zip(*pairs, strict=True)
            number = torch.bfloat16 if fast_bf16(device) else torch.float32
            straight = orthogonalize(torch.stack(moves), group["steps"], number).to(dtype)
            scale = 0.2 * math.sqrt(max(rows, columns)) if group["match_rms"] else math.sqrt(max(1.0, rows / columns))
            torch._foreach_add_(targets, straight.unbind(0), alpha=-lr * scale)
        for parameter, change in zip(live, moved, strict=True):
            if is_sharded(parameter):
                local(parameter).add_(local(share(change, parameter)))

    def _adamw(self, group: dict[str, Any], live: list[Tensor]) -> None:
        for parameter in live:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}  # fmt: skip
        states = [self.state[parameter] for parameter in live]
        first, second = group["betas"]
        adamw(
            locals_of(live), locals_of(parameter.grad for parameter in live),  # type: ignore[misc]
            locals_of(s["exp_avg"] for s in states), locals_of(s["exp_avg_sq"] for s in states), [],
            [s["step"] for s in states],
            fused=True, amsgrad=False, beta1=first, beta2=second, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip

    def _sgd(self, group: dict[str, Any], live: list[Tensor]) -> None:
        for parameter in live:
            rows, gradient = _touched(parameter)
            parameter.index_add_(0, rows, gradient, alpha=-group["lr"])

    def _rowwise(self, group: dict[str, Any], live: list[Tensor]) -> None:
        (first, second), eps = group["betas"], group["eps"]
        for parameter in live:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] += 1
            rows, gradient = _touched(parameter)
            average = state["exp_avg"][rows].lerp_(gradient, 1 - first)
            square = state["exp_avg_sq"][rows].mul_(second).addcmul_(gradient, gradient, value=1 - second)
            state["exp_avg"][rows], state["exp_avg_sq"][rows] = average, square
            count = float(state["step"])
            size = group["lr"] * math.sqrt(1 - second**count) / (1 - first**count)
            parameter.index_add_(0, rows, average.div_(square.sqrt_().add_(eps)), alpha=-size)


def _touched(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that have a gradient, (N,), and it, (N, …)."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        return gradient.indices()[0], gradient.values()
    rows = gradient.flatten(1).any(1).nonzero().squeeze(1)
    return rows, gradient[rows]


def _split(parameter: Tensor) -> int:
    return int(getattr(parameter, "muon_split", 1)) or 1


def build(
    model: nn.Module,
    *,
    optimizer: str = "muon",
    lr: float = 1e-3,
    muon_lr: float | None = None,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    momentum: float = 0.95,
    eps: float = 1e-8,
    steps: int = 5,
    decay_embeddings: bool = True,
    batch_size: int = 1,
) -> MuonAdamW:
    """The optimizer for `model`.

    "muon": the matrices inside each `Trunk`, and any weight with ``muon_split``, go to Muon at `muon_lr` (None: at
    `lr`, with AdamW's step size); the rest to AdamW at `lr`. "adamw": everything goes to AdamW. Weights with fewer than
    two axes never decay, nor do tables marked ``rowwise``. A weight with an attribute ``sgd = r`` moves by r times the
    sum of the gradients of the `batch_size` rows that the loss is the mean of. Each group keeps its peak rate in
    ``base_lr``; `set_lr` scales it.
    """
    if optimizer not in ("muon", "adamw"):
        raise ValueError(f"optimizer: {optimizer!r}; known: muon, adamw")
    matrices = set(_matrices(model)) if optimizer == "muon" else set()
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    muon, decayed, plain, rowwise, sgd = [], [], [], [], []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter in matrices:
            muon.append(parameter)
        elif getattr(parameter, "sgd", 0):
            sgd.append((parameter, float(parameter.sgd)))  # type: ignore[attr-defined]
        elif getattr(parameter, "rowwise", False):
            rowwise.append(parameter)
        elif parameter.dim() >= 2 and (decay_embeddings or parameter not in tables):
            decayed.append(parameter)
        else:
            plain.append(parameter)
    adam = {"lr": lr, "betas": tuple(betas), "eps": eps}
    groups: list[dict[str, Any]] = [
        {"params": muon, "muon": True, "lr": lr if muon_lr is None else muon_lr, "weight_decay": weight_decay,
         "momentum": momentum, "steps": steps, "match_rms": muon_lr is None},
        {"params": decayed, "weight_decay": weight_decay, **adam},
        {"params": plain, "weight_decay": 0.0, **adam},
        {"params": rowwise, "rowwise": True, "weight_decay": 0.0, **adam},
        *({"params": [p], "sgd": True, "weight_decay": 0.0, "lr": rate * batch_size} for p, rate in sgd),
    ]  # fmt: skip
    groups = [group for group in groups if group["params"]]
    for group in groups:
        group["base_lr"] = group["lr"]
    return MuonAdamW(groups)


def _matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    """Hidden matrices: those of a trunk, and those that a module marked itself (``muon_split``; 0 keeps one out)."""
    for module in model.modules():
        trunk = isinstance(module, Trunk)
        for parameter in module.parameters(recurse=trunk):
            marked = getattr(parameter, "muon_split", None)
            if parameter.dim() == 2 and (trunk if marked is None else marked):
                yield parameter


# ---- schedule ------------------------------------------------------------------------------------------------------


def lr_scale(step: int, *, steps: int, warmup: int = 0, decay: str = "cosine", floor: float = 0.0) -> float:
    """The factor on every group's peak rate at `step` (0 … steps − 1): a pure function.

    Rises linearly to 1 over the first `warmup` steps, never starting at 0, then falls to `floor` at the last step along
    a half cosine ("cosine") or a line ("linear"), or stays ("constant"). `floor` is min_lr / lr.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if decay == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    if decay == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    if decay == "linear":
        return floor + (1 - floor) * (1 - done)
    raise ValueError(f"decay: {decay!r}; known: cosine, linear, constant")


def set_lr(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Sets every group's rate to `scale` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * scale


# ---- gradients -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def clip(parameters: Iterable[Tensor], max_norm: float | None = None, scale: float = 1.0) -> Tensor:
    """Multiplies all gradients by `scale`, then shrinks them so that their joint 2-norm is at most `max_norm`.

    Returns the norm after scaling and before shrinking, a tensor (). `scale` is 1/count where gradients are of sums. A
    norm that is not finite leaves gradients that are not finite behind: see `first_bad`.
    """
    gradients = [_numbers(parameter) for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    length = norm(gradients) * scale
    factor: Tensor | float = scale
    if max_norm:
        # A norm that is no number must not spread to every gradient: `first_bad` still has to find the one at fault.
        factor = torch.where(length.isfinite(), scale * (max_norm / (length + 1e-6)).clamp(max=1.0), scale)
    if not isinstance(factor, float) or factor != 1.0:
        torch._foreach_mul_(locals_of(gradients), factor)
    return length


def _numbers(parameter: Tensor) -> Tensor:
    """The gradient, or of a sparse one its values: the same memory, so that what is done to them is done to it."""
    assert parameter.grad is not None
    if not parameter.grad.is_sparse:
        return parameter.grad
    parameter.grad = parameter.grad.coalesce()  # a row looked up twice counts once, by its sum
    return parameter.grad.values()


def first_bad(model: nn.Module) -> str | None:
    """The name of the first parameter whose gradient, or else whose value, is not finite; None where all are."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not local(_numbers(parameter)).isfinite().all():
            return name
    for name, parameter in model.named_parameters():
        if not local(parameter).isfinite().all():
            return name
    return None


# ---- moving average of the weights ---------------------------------------------------------------------------------


class EMA:
    """An exponential moving average of the parameters, corrected for its start as Adam's averages are.

    After t updates the average is Σᵢ (1−d) dᵗ⁻ⁱ wᵢ / (1 − dᵗ): the first weights count fully and nothing of the random
    start remains (Kingma & Ba 2015, section 3, applied to weights).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._live = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._mean = {name: parameter.detach().clone() for name, parameter in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the model's present weights in."""
        self.updates += 1
        weight = (1 - self.decay) / (1 - self.decay**self.updates)
        torch._foreach_lerp_(locals_of(self._mean.values()), locals_of(self._live.values()), weight)

    def tensors(self) -> dict[str, Tensor]:
        """The averages by parameter name, to be saved beside `updates`."""
        return self._mean

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Takes up saved averages. KeyError where names differ."""
        if tensors.keys() != self._mean.keys():
            raise KeyError(f"averages differ in names: {sorted(tensors.keys() ^ self._mean.keys())[:5]}")
        for name, mean in self._mean.items():
            fill(mean, tensors[name])
        self.updates = updates

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside the block the model holds the averages; after it, its own weights again, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._live.items():
            here, mean = local(parameter), local(self._mean[name])
            own = here.clone()
            here.copy_(mean)
            mean.copy_(own)
