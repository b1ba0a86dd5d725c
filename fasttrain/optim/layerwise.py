"""LARS and LAMB: optimizers that scale a parameter's step by norms, of whole parameters even where they are sharded.

An optimizer may be handed a parameter itself, or a flat shard made of pieces of many, as ZeRO cuts them. A norm belongs
to the parameter, not to what a rank holds of it: squared norms are taken piece by piece, summed over the ranks, and the
root of the sum is the norm. ``step`` sums all of them in one reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """The part of one parameter that a rank's flat shard holds: ``numel`` elements from ``start``, maybe none."""

    start: int
    numel: int


Layout = Sequence[Piece]
"""The pieces of a flat shard: one for every parameter of the group, in the same order on every rank."""


@dataclass
class _Held:
    """What this rank holds of one parameter group, as views, piece by piece and never the padding between them."""

    group: dict[str, Any]
    numbers: list[int] = field(default_factory=list)
    """Which parameter of the group each piece belongs to, in the numbering that all ranks share."""
    parameters: int = 0
    weights: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    state: dict[str, list[Any]] = field(default_factory=dict)
    """Tensors are views of the piece; numbers are repeated for every piece."""
    proposal: list[Tensor] = field(default_factory=list)
    ratios: list[Tensor] | None = None
    """A factor a piece; None where the steps are not scaled."""

    @property
    def adapts(self) -> bool:
        """Whether the group's steps are scaled by norms: where its ``layerwise`` says so, else where it has decay.

        Official codes leave out biases and norms by name or shape, timm those without weight decay. A group that only
        happens to have none, now or at the end of a schedule, must not turn into SGD at LARS's learning rates.
        """
        return bool(self.group.get("layerwise", self.group["weight_decay"] != 0))


class LayerwiseOptimizer(torch.optim.Optimizer):
    """What LARS and LAMB share: one norm a parameter, from whatever pieces of it the ranks hold.

    Whether a parameter has a gradient must not depend on the rank, since all ranks take part in one reduction.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            if defaults.get(name, 0) < 0:
                raise ValueError(f"{name} must be at least 0, got {defaults[name]}")
        super().__init__(params, defaults)
        self._layouts: Mapping[Tensor, Layout] | None = None
        self._sum_over_ranks: Callable[[Tensor], object] = lambda squares: None

    def shard(self, layouts: Mapping[Tensor, Layout], sum_over_ranks: Callable[[Tensor], object]) -> None:
        """From now on every tensor of the groups is a flat shard with a layout.

        ``sum_over_ranks`` replaces an fp64 tensor by its sum over the ranks that share the parameters. ``step`` calls
        it once, with 2 numbers for every parameter of the groups whose steps are scaled (16 bytes), and not at all
        if there is none.
        """
        self._layouts, self._sum_over_ranks = layouts, sum_over_ranks

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; ``closure``, if given, reevaluates the loss first, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [self._held(group) for group in self.param_groups]
        for held in groups:
            held.proposal = self._propose(held) if held.weights else []
        adapting = [held for held in groups if held.adapts and held.parameters]
        for held, norms in zip(adapting, self._norms(adapting), strict=True):
            ratios = self._trust_ratios(held.group, *norms).unbind()
            held.ratios = [ratios[number] for number in held.numbers]
        for held in groups:
            if held.weights:
                self._apply(held)
        return loss

    def _held(self, group: dict[str, Any]) -> _Held:
        held = _Held(group)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            self._advance(state, parameter, group)
            for piece in self._pieces(parameter):
                if piece is None or piece.numel:
                    held.numbers.append(held.parameters)
                    held.weights.append(_view(parameter, piece))
                    held.gradients.append(_view(parameter.grad, piece))
                    for name, value in state.items():
                        held.state.setdefault(name, []).append(_view(value, piece))
                held.parameters += 1
        return held

    def _pieces(self, parameter: Tensor) -> Sequence[Piece | None]:
        """The layout of a shard; None for a whole parameter."""
        if self._layouts is None:
            return (None,)
        if parameter not in self._layouts:
            raise LookupError(f"no layout was given for a shard of {parameter.numel()} elements")
        return self._layouts[parameter]

    def _norms(self, adapting: Sequence[_Held]) -> list[Tensor]:
        """Norms of weights (row 0) and proposals (row 1) for every parameter, one tensor a group, in one reduction.

        The squares are fp64: that of a small fp32 gradient would be 0, and 0 turns the trust ratio off.
        """
        if not adapting:
            return []
        rows = [_norms_by_number(held.weights, held) for held in adapting]
        rows += [_norms_by_number(held.proposal, held) for held in adapting]
        squares = torch.stack([norm for row in rows for norm in row]).double().square_()
        self._sum_over_ranks(squares)
        norms = torch.split(squares.sqrt_().view(2, -1), [held.parameters for held in adapting], dim=1)
        return [norm.to(held.group["params"][0].dtype) for norm, held in zip(norms, adapting, strict=True)]

    def _advance(self, state: dict[str, Any], parameter: Tensor, group: dict[str, Any]) -> None:
        """Make a parameter's state at its first step, and count the steps where that matters."""
        raise NotImplementedError

    def _propose(self, held: _Held) -> list[Tensor]:
        """For every piece, what is proposed for its weights, whose norm is compared with theirs."""
        raise NotImplementedError

    def _trust_ratios(self, group: dict[str, Any], weights: Tensor, proposals: Tensor) -> Tensor:
        """The factors of the parameters' steps, from the norms of their weights and of what is proposed for them."""
        raise NotImplementedError

    def _apply(self, held: _Held) -> None:
        """Move the pieces by what is proposed, times the ratios if there are any."""
        raise NotImplementedError


class Lars(LayerwiseOptimizer):
    """LARS with momentum: ``m <- momentum m + r (g + wd w)``, ``w <- w - lr m``, r as in :meth:`_trust_ratios`.

    A group that is not ``layerwise``, by default one whose ``weight_decay`` wd is 0, is not scaled: r = 1 and wd = 0.
    ``trust_coeff`` is the share of its own norm by which a parameter may move, at a learning rate of 1.

    Raises ValueError for a negative ``lr``, ``momentum`` or ``weight_decay``.
    You, Gitman, Ginsburg, arXiv:1708.03888. The formulas, names and state are those of ``timm.optim.Lars``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coeff: float = 0.001,
        eps: float = 1e-8,
    ) -> None:
        values = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coeff": trust_coeff, "eps": eps}
        super().__init__(params, values)

    def _advance(self, state: dict[str, Any], parameter: Tensor, group: dict[str, Any]) -> None:
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)

    def _propose(self, held: _Held) -> list[Tensor]:
        return held.gradients

    def _trust_ratios(self, group: dict[str, Any], weights: Tensor, proposals: Tensor) -> Tensor:
        """``trust_coeff |w| / (|g| + wd |w| + eps)``, and 1 where either norm is 0."""
        divisor = proposals + weights * group["weight_decay"] + group["eps"]
        return _unless_zero(group["trust_coeff"] * weights / divisor, weights, proposals)

    def _apply(self, held: _Held) -> None:
        steps = held.proposal
        if held.ratios is not None:
            # Not in place: these are the gradients.
            steps = list(torch._foreach_add(steps, held.weights, alpha=held.group["weight_decay"]))
            torch._foreach_mul_(steps, held.ratios)
        momentum = held.state["momentum_buffer"]
        torch._foreach_mul_(momentum, held.group["momentum"])
        torch._foreach_add_(momentum, steps)
        torch._foreach_add_(held.weights, momentum, alpha=-held.group["lr"])


class Lamb(LayerwiseOptimizer):
    """LAMB: Adam's step u with bias correction and weight decay inside, ``w <- w - lr (|w| / |u|) u``.

    ``u = m / (sqrt(v) + eps) + wd w``, with m and v the averages of the gradient and of its square, each divided by
    what it would be of ones. A group that is not ``layerwise``, by default one whose ``weight_decay`` wd is 0, is not
    scaled: u is its step.

    Raises ValueError for a negative ``lr`` or ``weight_decay``.
    You et al., arXiv:1904.00962. The formulas are those of ``timm.optim.Lamb`` with ``max_grad_norm=None`` (the
    trainer's clipping is DeepSpeed's). A state can be loaded from it and from apex's ``FusedLAMB``, and the latter
    loads this one's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        values = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        # apex's FusedLAMB reads the last two from the groups of a state that it loads.
        super().__init__(params, values | {"bias_correction": True, "grad_averaging": True})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for parameter in group["params"]:
                if self.state.get(parameter):  # of timm or apex, which count by group
                    self.state[parameter].setdefault("step", int(group.get("step", 0)))

    def _advance(self, state: dict[str, Any], parameter: Tensor, group: dict[str, Any]) -> None:
        if "exp_avg" not in state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        # ZeRO-3 may step the shards of one group one after another, so each counts for itself.
        state["step"] += 1
        group["step"] = state["step"]  # where apex looks for it

    def _propose(self, held: _Held) -> list[Tensor]:
        (beta1, beta2), means, squares = held.group["betas"], held.state["exp_avg"], held.state["exp_avg_sq"]
        torch._foreach_lerp_(means, held.gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, held.gradients, held.gradients, value=1 - beta2)
        divisors = torch._foreach_sqrt(squares)
        torch._foreach_div_(divisors, [(1 - beta2**step) ** 0.5 for step in held.state["step"]])
        torch._foreach_add_(divisors, held.group["eps"])
        proposal = list(torch._foreach_div(means, [1 - beta1**step for step in held.state["step"]]))
        torch._foreach_div_(proposal, divisors)
        if held.adapts:
            torch._foreach_add_(proposal, held.weights, alpha=held.group["weight_decay"])
        return proposal

    def _trust_ratios(self, group: dict[str, Any], weights: Tensor, proposals: Tensor) -> Tensor:
        """``|w| / |u|``, and 1 where either norm is 0."""
        return _unless_zero(weights / proposals, weights, proposals)

    def _apply(self, held: _Held) -> None:
        if held.ratios is not None:
            torch._foreach_mul_(held.proposal, held.ratios)
        torch._foreach_add_(held.weights, held.proposal, alpha=-held.group["lr"])


def _view(value: Any, piece: Piece | None) -> Any:
    """The piece of a flat tensor; all of it without a piece; numbers as they are."""
    return value if piece is None or not isinstance(value, Tensor) else value.narrow(0, *piece)


def _norms_by_number(tensors: list[Tensor], held: _Held) -> list[Tensor]:
    """A norm for every parameter of the group: of its piece, or 0 where this rank holds none."""
    zero = held.group["params"][0].new_zeros(())
    norms = [zero] * held.parameters
    if tensors:
        for number, norm in zip(held.numbers, torch._foreach_norm(tensors), strict=True):
            norms[number] = norm
    return norms


def _unless_zero(ratios: Tensor, weights: Tensor, proposals: Tensor) -> Tensor:
    """The ratios, and 1, a plain step, where a norm is 0."""
    return torch.where((weights > 0) & (proposals > 0), ratios, 1.0)
