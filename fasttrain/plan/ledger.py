"""What a step does, operator by operator: floating-point operations, bytes moved, bytes alive, bytes kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .. import kernels  # noqa: F401 (defines torch.ops.fasttrain)

_ATEN, _OURS = torch.ops.aten, torch.ops.fasttrain
_SCALAR = _ATEN._local_scalar_dense.default
_CAST = _ATEN._to_copy.default
_KERNELS = {_OURS.pair_lse, _OURS.pair_lse_backward, _OURS.self_lse, _OURS.self_lse_backward}
_KERNELS |= {_OURS.prototype_terms, _OURS.prototype_terms_backward}


class Work(NamedTuple):
    """One operator: floating-point operations (a multiplication and an addition are 2), and bytes read and written."""

    flops: int
    bytes: int


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every operator that runs below it, on tensors that have no numbers.

    A number that Python asks for is 0, and fasttrain's kernels are those of the GPU. ``work`` is the operators so far,
    ``peak`` the most bytes that were alive at once of all that they made, ``weight_copies`` the storages that are alive
    of what autocast made of the trained ``weights``.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work: list[Work] = []
        self.alive = self.peak = 0
        self.weight_copies: weakref.WeakSet[Any] = weakref.WeakSet()
        self._weights = {_storage(weight) for weight in weights if weight.requires_grad}
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._formulas = _flop_formulas()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and note it."""
        if func is _SCALAR:
            return 0.0 if args[0].is_floating_point() else 0
        packet = func._overloadpacket
        if packet in _KERNELS:
            args = (*args[:-1], "triton")  # the backend is every kernel's last argument
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = _tensors((args, kwargs))
        if func is _CAST and _storage(read[0]) in self._weights:
            self.weight_copies.add(out.untyped_storage())
        before = {_storage(x) for x in read}
        new = [x for x in _tensors(out) if _storage(x) not in before]
        written = [*new, *_changed(func._schema, args, kwargs)]
        moved = sum(map(_touched, [*read, *written])) if written else 0  # a view moves nothing
        formula = self._formulas.get(packet)
        flops = int(formula(*args, **kwargs, out_val=out)) if formula else 0
        if flops or moved:
            self.work.append(Work(flops, moved))
        for tensor in new:
            self._born(tensor.untyped_storage())
        return out

    def _born(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._died, size)

    def _died(self, size: int) -> None:
        self.alive -= size


class Kept:
    """Counts what autograd keeps for the backward pass: every storage once, but for parameters, buffers and inputs.

    ``network`` bytes are kept by what runs inside the networks' modules, ``loss`` bytes by what the method does with
    their outputs, ``copies`` bytes are weights in autocast's precision.
    """

    def __init__(self, method: nn.Module, inputs: Iterable[Tensor], copies: Collection[Any] = ()) -> None:
        self._method = method
        # Held here, lest their numbers pass to others: ZeRO-3 gives parameters new storages as it goes.
        self._held = [x.untyped_storage() for x in (*method.parameters(), *method.buffers(), *inputs)]
        self._others = {storage._cdata for storage in self._held}
        self._copies = copies
        self._found: dict[int, tuple[str, int]] = {}
        self._depth = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count within."""
        networks = [c for c in self._method.children() if any(True for _ in c.parameters())]
        inside = [m for network in networks for m in network.modules()]
        hooks = [m.register_forward_pre_hook(lambda *_: self._enter(1)) for m in inside]
        hooks += [m.register_forward_hook(lambda *_: self._enter(-1)) for m in inside]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda x: x):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def total(self, where: str) -> int:
        """Bytes kept in ``network``, ``loss`` or ``copies``."""
        return sum(size for place, size in self._found.values() if place == where)

    def _enter(self, by: int) -> None:
        self._depth += by

    def _keep(self, x: Tensor) -> Tensor:
        if isinstance(x, nn.Parameter):  # itself: ZeRO-3, which gives it other storages as it goes, knows it by that
            return x
        key = _storage(x)
        if key not in self._others and not isinstance(x._base, nn.Parameter):
            place = "copies" if x.untyped_storage() in self._copies else "network" if self._depth else "loss"
            self._found.setdefault(key, (place, x.untyped_storage().nbytes()))
        return x.detach()


def _storage(x: Tensor) -> int:
    number: int = x.untyped_storage()._cdata
    return number


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _changed(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operator changes in place."""
    if not schema.is_mutable:
        return []
    given = {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | kwargs
    names = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return _tensors([given.get(name) for name in names])


def _touched(x: Tensor) -> int:
    """Bytes of a tensor, those that an expansion repeats counted once."""
    return min(x.nbytes, x.untyped_storage().nbytes())


def _flop_formulas() -> Mapping[Any, Callable[..., int]]:
    """Torch's formulas, attention on the CPU as on the GPU, and those of our kernels from ``kernels/NOTES.md``."""
    formulas = dict(FlopCounterMode(display=False, custom_mapping=_OUR_FLOPS).flop_registry)
    flash = "_scaled_dot_product_flash_attention"
    for name in (flash, f"{flash}_for_cpu"):
        formulas[getattr(_ATEN, name)] = formulas[getattr(_ATEN, flash)]
        formulas[getattr(_ATEN, f"{name}_backward")] = formulas[getattr(_ATEN, f"{flash}_backward")]
    return formulas


# Arguments are the operators' own, with shapes for tensors. A product of N x M x D is 2 N M D operations.


Shape = Sequence[int]


def _pair(x: Shape, y: Shape, *args: Any, out_shape: Any = None) -> int:
    return 2 * x[0] * y[0] * x[1]


def _pair_backward(x: Shape, y: Shape, *args: Any, out_shape: Any = None) -> int:
    # Each of the two gradients forms the scores again. args are bias, gain, rows, cols and so on to need_x, need_y.
    return 2 * sum(map(bool, args[9:11])) * _pair(x, y)


def _self(x: Shape, *args: Any, out_shape: Any = None) -> int:
    return _pair(x, x) // 2


def _self_backward(x: Shape, *args: Any, out_shape: Any = None) -> int:
    return 2 * _pair(x, x)


def _prototypes(
    student: Any, teacher: Any, prototypes: Any, others: Any, bias: Any, weights: Any, *args: Any, out_shape: Any = None
) -> int:
    of_teacher = 0 if teacher is None else 3 * _pair(teacher, prototypes)
    return (1 if weights is None else 2) * _pair(student, prototypes) + of_teacher


def _prototypes_backward(
    student: Any, teacher: Any, prototypes: Any, others: Any, bias: Any, weights: Any, *args: Any, out_shape: Any = None
) -> int:
    marginal_grad = args[7]
    of_teacher = 0 if teacher is None else _pair(teacher, prototypes)
    return (3 if marginal_grad is None else 4) * _pair(student, prototypes) + of_teacher


_OUR_FLOPS = {
    _OURS.pair_lse: _pair,
    _OURS.pair_lse_backward: _pair_backward,
    _OURS.self_lse: _self,
    _OURS.self_lse_backward: _self_backward,
    _OURS.prototype_terms: _prototypes,
    _OURS.prototype_terms_backward: _prototypes_backward,
}
