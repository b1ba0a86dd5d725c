"""LARS and LAMB: optimizers that scale each parameter's step by norms, also where ZeRO shards the parameters.

The norms belong to whole parameters. ZeRO gives an optimizer flat shards, made of pieces of many parameters. These
classes sum squared norms piece by piece and over the ranks, and take the root of the sum. ``step`` needs one reduction.

timm's classes need whole parameters, which means ZeRO stage 0. These exist so that ``--optimizer`` does not restrict
``--zero_stage``: the engine chooses the stage by memory, and every optimizer then works at the chosen stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """The part of one parameter in a rank's flat shard: ``numel`` elements from ``start``, possibly none."""

    start: int
    numel: int


Layout = Sequence[Piece]
"""The pieces of a flat shard: one for every parameter of the group, in the same order on every rank."""


@dataclass
class _LocalGroup:
    """This rank's part of one parameter group: views of the pieces, without the padding between them."""

    group: dict[str, Any]
    numbers: list[int] = field(default_factory=list)
    """The index in the group of each piece's parameter. All ranks share this numbering."""
    parameters: int = 0
    weights: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    state: dict[str, list[Any]] = field(default_factory=dict)
    """Tensors are views of the piece. Numbers are repeated for every piece."""
    proposal: list[Tensor] = field(default_factory=list)
    ratios: list[Tensor] | None = None
    """One factor per piece, or None where the steps are not scaled."""

    @property
    def adapts(self) -> bool:
        """Whether norms scale the group's steps: its ``layerwise`` flag, or else whether it has weight decay.

        The official codes exempt biases and norms by name or shape. timm exempts groups without weight decay. A group
        whose schedule reaches a weight decay of 0 must stay scaled: LARS's learning rates are far too high for SGD.
        """
        return bool(self.group.get("layerwise", self.group["weight_decay"] != 0))


class LayerwiseOptimizer(torch.optim.Optimizer):
    """Base of LARS and LAMB: it computes one norm per parameter from the pieces on all ranks.

    Whether a parameter has a gradient must not depend on the rank, because all ranks take part in one reduction.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            if defaults.get(name, 0) < 0:
                raise ValueError(f"{name}: must be at least 0, got {defaults[name]}.")
        super().__init__(params, defaults)
        self._layouts: Mapping[Tensor, Layout] | None = None
        self._sum_over_ranks: Callable[[Tensor], object] = lambda squares: None

    def shard(self, layouts: Mapping[Tensor, Layout], sum_over_ranks: Callable[[Tensor], object]) -> None:
        """Declare that every tensor of the groups is a flat shard with a layout.

        ``sum_over_ranks`` replaces an fp64 tensor by its sum over the ranks that share the parameters. ``step`` calls
        it once, with 2 numbers (16 bytes) for every parameter of the scaled groups. Without such groups it is not
        called.
        """
        self._layouts, self._sum_over_ranks = layouts, sum_over_ranks

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step. ``closure``, if present, computes the loss again first; its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [self._local_group(group) for group in self.param_groups]
        for local in groups:
            local.proposal = self._propose(local) if local.weights else []
        adapting = [local for local in groups if local.adapts and local.parameters]
        for local, norms in zip(adapting, self._norms(adapting), strict=True):
            ratios = self._trust_ratios(local.group, *norms).unbind()
            local.ratios = [ratios[number] for number in local.numbers]
        for local in groups:
            if local.weights:
                self._apply(local)
        return loss

    def _local_group(self, group: dict[str, Any]) -> _LocalGroup:
        local = _LocalGroup(group)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            self._advance(state, parameter, group)
            for piece in self._pieces(parameter):
                if piece is None or piece.numel:
                    local.numbers.append(local.parameters)
                    local.weights.append(_view(parameter, piece))
                    local.gradients.append(_view(parameter.grad, piece))
                    for name, value in state.items():
                        local.state.setdefault(name, []).append(_view(value, piece))
                local.parameters += 1
        return local

    def _pieces(self, parameter: Tensor) -> Sequence[Piece | None]:
        """Return the layout of a shard. A whole parameter gives ``(None,)``."""
        if self._layouts is None:
            return (None,)
        if parameter not in self._layouts:
            raise LookupError(f"a shard of {parameter.numel()} elements has no layout; pass it to shard()")
        return self._layouts[parameter]

    def _norms(self, adapting: Sequence[_LocalGroup]) -> list[Tensor]:
        """Return the norms of weights (row 0) and proposals (row 1), one column per parameter, one tensor per group.

        The squares are fp64. In fp32 the square of a small gradient would be 0, which switches the trust ratio off.
        """
        if not adapting:
            return []
        rows = [_norms_by_number(local.weights, local) for local in adapting]
        rows += [_norms_by_number(local.proposal, local) for local in adapting]
        squares = torch.stack([norm for row in rows for norm in row]).double().square_()
        self._sum_over_ranks(squares)
        norms = torch.split(squares.sqrt_().view(2, -1), [local.parameters for local in adapting], dim=1)
        return [norm.to(local.group["params"][0].dtype) for norm, local in zip(norms, adapting, strict=True)]

    def _advance(self, state: dict[str, Any], parameter: Tensor, group: dict[str, Any]) -> None:
        """Create a parameter's state at its first step, and count the steps if the optimizer needs the count."""
        raise NotImplementedError

    def _propose(self, local: _LocalGroup) -> list[Tensor]:
        """Return the proposed step of every piece. Its norm is compared with the weights' norm."""
        raise NotImplementedError

    def _trust_ratios(self, group: dict[str, Any], weights: Tensor, proposals: Tensor) -> Tensor:
        """Return one factor per parameter from the norms of the weights and of the proposals."""
        raise NotImplementedError

    def _apply(self, local: _LocalGroup) -> None:
        """Move the pieces by the proposals, times the ratios if the group has any."""
        raise NotImplementedError


class Lars(LayerwiseOptimizer):
    """LARS with momentum: ``m <- momentum m + r (g + wd w)``, ``w <- w - lr m``, r as in :meth:`_trust_ratios`.

    A group that is not ``layerwise`` is not scaled: r = 1 and wd = 0. Without the flag, groups with ``weight_decay`` 0
    are not scaled. At a learning rate of 1, a parameter may move by ``trust_coeff`` times its own norm.

    Raises ValueError for a negative ``lr``, ``momentum`` or ``weight_decay``.
    You, Gitman, Ginsburg, arXiv:1708.03888. The formulas, names and state match ``timm.optim.Lars``.
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

    def _propose(self, local: _LocalGroup) -> list[Tensor]:
        return local.gradients

    def _trust_ratios(self, group: dict[str, Any], weights: Tensor, proposals: Tensor) -> Tensor:
        """Return ``trust_coeff |w| / (|g| + wd |w| + eps)``, or 1 where either norm is 0."""
        divisor = proposals + weights * group["weight_decay"] + group["eps"]
        return _unless_zero(group["trust_coeff"] * weights / divisor, weights, proposals)

    def _apply(self, local: _LocalGroup) -> None:
        steps = local.proposal
        if local.ratios is not None:
            # Not in place: the proposals are the gradients themselves.
            steps = list(torch._foreach_add(steps, local.weights, alpha=local.group["weight_decay"]))
            torch._foreach_mul_(steps, local.ratios)
        momentum = local.state["momentum_buffer"]
        torch._foreach_mul_(momentum, local.group["momentum"])
        torch._foreach_add_(momentum, steps)
        torch._foreach_add_(local.weights, momentum, alpha=-local.group["lr"])


class Lamb(LayerwiseOptimizer):
    """LAMB: Adam's step u with bias correction and weight decay inside, ``w <- w - lr (|w| / |u|) u``.

    ``u = m / (sqrt(v) + eps) + wd w``, with m and v the bias-corrected averages of the gradient and of its square. A
    group that is not ``layerwise`` is not scaled: u without ``wd w`` is its step. Without the flag, groups with
    ``weight_decay`` 0 are not scaled.

    Raises ValueError for a negative ``lr`` or ``weight_decay``.
    You et al., arXiv:1904.00962. The formulas match ``timm.optim.Lamb`` with ``max_grad_norm=None``, because DeepSpeed
    clips the gradients. This class loads the state of timm's Lamb and of apex's ``FusedLAMB``, and apex loads this
    class's state.
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
        # apex's FusedLAMB reads the last two values from the groups of a state that it loads.
        super().__init__(params, values | {"bias_correction": True, "grad_averaging": True})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for parameter in group["params"]:
                if self.state.get(parameter):  # timm and apex count the steps per group
                    self.state[parameter].setdefault("step", int(group.get("step", 0)))

    def _advance(self, state: dict[str, Any], parameter: Tensor, group: dict[str, Any]) -> None:
        if "exp_avg" not in state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        # ZeRO-3 may step the shards of one group one after another, so each shard has its own count.
        state["step"] += 1
        group["step"] = state["step"]  # apex reads the count here

    def _propose(self, local: _LocalGroup) -> list[Tensor]:
        (beta1, beta2), means, squares = local.group["betas"], local.state["exp_avg"], local.state["exp_avg_sq"]
        torch._foreach_lerp_(means, local.gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, local.gradients, local.gradients, value=1 - beta2)
        divisors = torch._foreach_sqrt(squares)
        torch._foreach_div_(divisors, [(1 - beta2**step) ** 0.5 for step in local.state["step"]])
        torch._foreach_add_(divisors, local.group["eps"])
        proposal = list(torch._foreach_div(means, [1 - beta1**step for step in local.state["step"]]))
        torch._foreach_div_(proposal, divisors)
        if local.adapts:
            torch._foreach_add_(proposal, local.weights, alpha=local.group["weight_decay"])
        return proposal

    def _trust_ratios(self, group: dict[str, Any], weights: Tensor, proposals: Tensor) -> Tensor:
        """Return ``|w| / |u|``, or 1 where either norm is 0."""
        return _unless_zero(weights / proposals, weights, proposals)

    def _apply(self, local: _LocalGroup) -> None:
        if local.ratios is not None:
            torch._foreach_mul_(local.proposal, local.ratios)
        torch._foreach_add_(local.weights, local.proposal, alpha=-local.group["lr"])


def _view(value: Any, piece: Piece | None) -> Any:
    """Return a piece of a flat tensor, or the value itself for a whole parameter or a number."""
    return value if piece is None or not isinstance(value, Tensor) else value.narrow(0, *piece)


def _norms_by_number(tensors: list[Tensor], local: _LocalGroup) -> list[Tensor]:
    """Return one norm per parameter of the group: the norm of this rank's piece, or 0 without a piece."""
    zero = local.group["params"][0].new_zeros(())
    norms = [zero] * local.parameters
    if tensors:
        for number, norm in zip(local.numbers, torch._foreach_norm(tensors), strict=True):
            norms[number] = norm
    return norms


def _unless_zero(ratios: Tensor, weights: Tensor, proposals: Tensor) -> Tensor:
    """Return the ratios, or 1 (an unscaled step) where a norm is 0."""
    return torch.where((weights > 0) & (proposals > 0), ratios, 1.0)
