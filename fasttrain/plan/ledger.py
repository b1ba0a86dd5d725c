"""Count a step operator by operator: floating-point operations, bytes moved, bytes alive and bytes saved."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
_DETACH = _ATEN.detach.default


class Work(NamedTuple):
    """An operator's floating-point operations (a multiplication and an addition are 2), and bytes read and written."""

    flops: int
    bytes: int


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record every operator that runs inside, on tensors without values.

    A value that Python reads is 0. fasttrain's kernels use the GPU's backend. ``calls`` counts the operators, views
    included. ``work`` lists the operators that compute or move data. ``peak`` is the largest number of bytes of their
    outputs that were alive at once. ``weight_copies`` are autocast's copies of the trained ``weights`` that are alive.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work: list[Work] = []
        self.calls = self.alive = self.peak = 0
        self.weight_copies: weakref.WeakSet[Any] = weakref.WeakSet()
        self._weights = {_storage(weight) for weight in weights if weight.requires_grad}
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._formulas = _flop_formulas()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and record it."""
        self.calls += func.namespace != "prim" and func is not _DETACH  # both are calls of this bookkeeping
        if func is _SCALAR:
            return 0.0 if args[0].is_floating_point() else 0
        packet = func._overloadpacket
        kwargs = kwargs or {}
        if packet in _KERNELS:
            args, kwargs = (), _named(func._schema, args, kwargs) | {"backend": "triton"}
        out = func(*args, **kwargs)
        read = _tensors((args, kwargs))
        if func is _CAST and _storage(read[0]) in self._weights:
            self.weight_copies.add(out.untyped_storage())
        before = {_storage(x) for x in read}
        new = [x for x in _tensors(out) if _storage(x) not in before]
        written = [*new, *_changed(func._schema, args, kwargs)]
        moved = sum(map(_touched, [*read, *written])) if written else 0  # a view moves nothing
        if packet in _KERNELS:
            flops = _KERNELS[packet](**kwargs)
        else:
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
    """Count what autograd saves for the backward pass: every storage once, without parameters, buffers and inputs.

    ``network`` bytes are saved inside the networks' modules, ``loss`` bytes by the method's computations with their
    outputs. ``copies`` bytes are weights in autocast's precision.
    """

    def __init__(self, method: nn.Module, inputs: Iterable[Tensor], copies: Collection[Any] = ()) -> None:
        self._method = method
        # These references keep the addresses valid: ZeRO-3 replaces the storages of parameters during a step.
        self._storages = [x.untyped_storage() for x in (*method.parameters(), *method.buffers(), *inputs)]
        self._ignored = {storage._cdata for storage in self._storages}
        self._copies = copies
        self._saved: dict[int, tuple[str, int]] = {}
        self._depth = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count inside this context."""
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
        """Return the bytes saved in ``network``, ``loss`` or ``copies``."""
        return sum(size for place, size in self._saved.values() if place == where)

    def _enter(self, by: int) -> None:
        self._depth += by

    def _keep(self, x: Tensor) -> Tensor:
        if isinstance(x, nn.Parameter):  # do not detach: ZeRO-3 recognises a parameter by its identity
            return x
        key = _storage(x)
        if key not in self._ignored and not isinstance(x._base, nn.Parameter):
            place = "copies" if x.untyped_storage() in self._copies else "network" if self._depth else "loss"
            self._saved.setdefault(key, (place, x.untyped_storage().nbytes()))
        return x.detach()


def _storage(x: Tensor) -> int:
    number: int = x.untyped_storage()._cdata
    return number


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _named(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return an operator's arguments by name."""
    return {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | kwargs


def _changed(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that an operator changes in place."""
    if not schema.is_mutable:
        return []
    arguments = _named(schema, args, kwargs)
    names = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return _tensors([arguments.get(name) for name in names])


def _touched(x: Tensor) -> int:
    """Return the bytes of a tensor. Bytes that an expansion repeats count once."""
    return min(x.nbytes, x.untyped_storage().nbytes())


def _flop_formulas() -> Mapping[Any, Callable[..., int]]:
    """Return torch's formulas, with attention on the CPU counted as on the GPU."""
    formulas = dict(FlopCounterMode(display=False).flop_registry)
    flash = "_scaled_dot_product_flash_attention"
    for name in (flash, f"{flash}_for_cpu"):
        formulas[getattr(_ATEN, name)] = formulas[getattr(_ATEN, flash)]
        formulas[getattr(_ATEN, f"{name}_backward")] = formulas[getattr(_ATEN, f"{flash}_backward")]
    return formulas


# Operations of fasttrain's kernels, from kernels/NOTES.md. Parameters have the names of the operators' schemas.


def _product(x: Tensor, y: Tensor) -> int:
    """Return the operations of x [N, D] times y^T [D, M]: 2 N M D."""
    return 2 * x.shape[0] * y.shape[0] * x.shape[1]


def _pair(x: Tensor, y: Tensor, **_: Any) -> int:
    return _product(x, y)


def _pair_backward(x: Tensor, y: Tensor, need_x: bool, need_y: bool, **_: Any) -> int:
    return 2 * (need_x + need_y) * _product(x, y)  # each gradient computes the scores again


def _self(x: Tensor, **_: Any) -> int:
    return _product(x, x) // 2


def _self_backward(x: Tensor, **_: Any) -> int:
    return 2 * _product(x, x)


def _contrast(q: Tensor, queue: Tensor | None, joint: bool, **_: Any) -> int:
    return 2 * _product(q, q) if joint else _product(q, q if queue is None else queue)


def _contrast_backward(
    q: Tensor, queue: Tensor | None, joint: bool, need_q: bool, need_k: bool, need_queue: bool, **_: Any
) -> int:
    if joint:
        return 8 * _product(q, q)
    return 2 * _product(q, q) * (need_q + need_k) if queue is None else 2 * _product(q, queue) * (need_q + need_queue)


def _prototypes(student: Tensor, teacher: Tensor | None, prototypes: Tensor, marginal: bool, **_: Any) -> int:
    of_teacher = 0 if teacher is None else 3 * _rows_product(teacher, prototypes)
    return (1 + marginal) * _rows_product(student, prototypes) + of_teacher


def _prototypes_backward(
    student: Tensor,
    teacher: Tensor | None,
    prototypes: Tensor,
    marginal: bool,
    need_student: bool,
    need_prototypes: bool,
    **_: Any,
) -> int:
    of_teacher = 0 if teacher is None or not need_prototypes else _rows_product(teacher, prototypes)
    passes = 1 + need_student + need_prototypes + marginal
    return passes * _rows_product(student, prototypes) + of_teacher


def _rows_product(views: Tensor, prototypes: Tensor) -> int:
    """Return the operations of all rows of views [V, B, D] times prototypes^T."""
    return _product(views.flatten(0, 1), prototypes)


_KERNELS: Mapping[Any, Callable[..., int]] = {
    _OURS.pair_lse: _pair,
    _OURS.pair_lse_backward: _pair_backward,
    _OURS.self_lse: _self,
    _OURS.self_lse_backward: _self_backward,
    _OURS.contrastive_loss: _contrast,
    _OURS.contrastive_loss_backward: _contrast_backward,
    _OURS.prototype_loss: _prototypes,
    _OURS.prototype_loss_backward: _prototypes_backward,
}
