"""Memory and operations of torch code, counted call by call: as it runs (`Watch`), or without its numbers (`Shadow`).

In a shadow, tensors of floating point have shapes, types and a device, but no values: torch's fake tensors, which are
those of the meta device under the name of the real one, so that autocast and attention choose the kernels that they
would choose there. Integers and truth values stay real, since sizes follow from them: which tokens are asked for, how
long a row is. So a model that fits no machine is measured on any, in the time that its calls from Python take.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from .flops import flops_of

aten = torch.ops.aten
LARGE = 1 << 16  # integers of more elements that are made from nothing are noise: their values matter to no shape
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Watch(TorchDispatchMode):
    """Inside ``with watch.cast():`` torch works as ever, and `live`, `peak` and `flops` are counted.

    Attributes:
        live: bytes of tensors now alive.
        peak: the most there ever were.
        flops: floating-point operations of matrix products so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.apart: list[Tensor] = []
        """Gradients that no parameter holds."""
        self._held: dict[int, tuple[Any, _Share]] = {}

    @contextmanager
    def cast(self) -> Iterator[Watch]:
        with torch.random.fork_rng(devices=[]), self:
            yield self

    def input(self, tensor: Tensor) -> Tensor:
        """A tensor of the batch as it is to be given to the model."""
        self._count(tensor)
        return tensor

    def weights(self, model: nn.Module) -> nn.Module:
        """The model as it is to be trained."""
        return model

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, spec = tree_flatten((args, kwargs))
        out = self._run(func, args, kwargs, flat, spec)
        for tensor in itertools.chain(flat, tree_flatten(out)[0]):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        self.flops += flops_of(func, args, kwargs, out)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any, flat: list[Any], spec: Any) -> Any:
        return func(*args, **kwargs)

    def _count(self, tensor: Tensor, share: _Share | None = None) -> _Share:
        """See to it that the memory of `tensor` is counted, once: for its own, or as part of a `share`."""
        if tensor.is_sparse:
            self._count(tensor._indices())
            return self._count(tensor._values())
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return self._held[key][1]
        if share is None:
            share = _Share(storage.nbytes())
            self.live += share.size
            self.peak = max(self.peak, self.live)
        share.holders += 1
        self._held[key] = (weakref.ref(storage, lambda _: self._forget(key)), share)
        return share

    def _forget(self, key: int) -> None:
        share = self._held.pop(key)[1]
        share.holders -= 1
        if not share.holders:
            self.live -= share.size


class _Share:
    """Memory that one or two tensors stand for: a real one, and the one without numbers made of it."""

    def __init__(self, size: int) -> None:
        self.size, self.holders = size, 0


class Shadow(Watch):
    """A `Watch` under which nothing is computed and nothing allocated but integers."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode()
        self.rows = 1  # the most ids that any look-up had: no more rows of a table have a gradient

    @contextmanager
    def cast(self) -> Iterator[Watch]:
        with super().cast(), _Answers(self):
            yield self

    def input(self, tensor: Tensor) -> Tensor:
        return self.faked(tensor) if tensor.is_floating_point() else super().input(tensor)

    def weights(self, model: nn.Module) -> nn.Module:
        """The model with every weight that is real (one made of data) replaced by one without numbers."""
        made: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or isinstance(parameter, FakeTensor):
                    continue
                if id(parameter) not in made:
                    new = nn.Parameter(self.faked(parameter), requires_grad=parameter.requires_grad)
                    new.__dict__.update(parameter.__dict__)
                    made[id(parameter)] = new
                module._parameters[name] = made[id(parameter)]
        return model

    def faked(self, tensor: Tensor) -> Tensor:
        """A tensor without numbers that stands for a real one; the two count once."""
        if isinstance(tensor, FakeTensor):
            return tensor
        share = self._count(tensor)
        found = self.fake.from_tensor(tensor.detach())
        self._count(found, share)
        return found

    def _run(self, func: Any, args: Any, kwargs: Any, flat: list[Any], spec: Any) -> Any:
        given = [x for x in flat if isinstance(x, Tensor)]
        if any(isinstance(x, FakeTensor) for x in given):
            return self._without_numbers(func, args, kwargs, flat, spec)
        if given:
            return func(*args, **kwargs)
        with self.fake:
            out = func(*args, **kwargs)
        if isinstance(out, Tensor) and not out.is_floating_point() and out.numel() <= LARGE:
            return func(*args, **kwargs)
        return out

    def _without_numbers(self, func: Any, args: Any, kwargs: Any, flat: list[Any], spec: Any) -> Any:
        if func is aten._local_scalar_dense.default:  # what is asked of a number we have not
            return 1.0 if args[0].is_floating_point() else 1
        if func is aten.nonzero.default:
            return torch.zeros(min(args[0].numel(), self.rows), args[0].dim(), dtype=torch.int64)
        if func in (aten._ctc_loss.default, aten._ctc_loss.Tensor):
            return _ctc(*args)
        if func in (aten._ctc_loss_backward.default, aten._ctc_loss_backward.Tensor):
            return args[1].new_empty(args[1].shape)
        if func in INDEXING:
            args = (args[0], [part for index in args[1] for part in _places(index)], *args[2:])
            flat, spec = tree_flatten((args, kwargs))
        if func is aten.embedding.default:
            self.rows = max(self.rows, args[1].numel())
        args, kwargs = tree_unflatten([self.faked(x) if isinstance(x, Tensor) else x for x in flat], spec)
        with self.fake:
            return func(*args, **kwargs)


def _places(index: Any) -> Sequence[Any]:
    """An index of truth values as the places where they hold."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return (index,)
    return index.nonzero().unbind(1)


def _ctc(scores: Tensor, targets: Tensor, lengths: Any, sizes: Any, *more: Any) -> tuple[Tensor, Tensor]:
    """The shapes of CTC's loss (B,) and of the table α (B, T, 2·longest + 1) that is kept (Graves et al. 2006, 4.1)."""
    T, B = scores.shape[:2]
    return scores.new_empty(B), scores.new_empty(B, T, 2 * max(int(n) for n in sizes) + 1)


class _Answers(TorchFunctionMode):
    """What no dispatch mode sees: numbers handed to numpy (zeros), and look-ups with sparse gradients.

    torch's fake tensors know no sparse ones. The rows looked up stand for them as leaves of their own: their gradient
    is the sparse one's values.
    """

    ZEROS: ClassVar[dict[Any, Callable[[Tensor], Any]]] = {
        Tensor.numpy: lambda x: np.zeros(x.shape, str(x.dtype).removeprefix("torch.")),
        Tensor.tolist: lambda x: np.zeros(x.shape).tolist(),
    }

    def __init__(self, shadow: Shadow) -> None:
        super().__init__()
        self.shadow = shadow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.ZEROS and isinstance(args[0], FakeTensor):
            return self.ZEROS[func](args[0])
        if func is nn.functional.embedding and kwargs.get("sparse") and isinstance(args[1], FakeTensor):
            self.shadow.rows = max(self.shadow.rows, math.prod(args[0].shape))
            found = args[1].detach()[args[0]].requires_grad_(args[1].requires_grad)
            if found.requires_grad and torch.is_grad_enabled():
                found.register_post_accumulate_grad_hook(lambda x: self.shadow.apart.extend((args[0], x.grad)))
            return found
        return func(*args, **kwargs)
