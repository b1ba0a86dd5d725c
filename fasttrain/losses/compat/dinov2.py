"""Losses with the interfaces of facebookresearch/dinov2 (arXiv 2304.07193), with logits or without.

In DINOv2's trainer the heads return logits. :func:`without_logits` lets them return the inputs of their last layer, and
gives a loss the layers. The trainer's code stays as it is. Its losses and gradients are the same, without logits:

    without_logits(dino_loss, student.dino_head, teacher.dino_head)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import patch_cross_entropy, prototype_cross_entropy, prototype_sinkhorn_center, sinkhorn
from ...kernels.backend import Backend
from ...kernels.precision import at_least_single
from ..dino import MovingCenter
from ..koleo import KoLeoLoss

__all__ = ["DINOLoss", "KoLeoLoss", "LastLayer", "Targets", "iBOTPatchLoss", "without_logits"]


@dataclass(frozen=True)
class Targets:
    """The teacher's assignments ``softmax((features prototypes^T - center) / temp)``, not computed.

    It has the methods of a tensor [..., K] that DINOv2's and DINOv3's trainers call; the last dimension is D instead.
    """

    features: Tensor
    """Rows [..., D]."""
    prototypes: Tensor
    """The weight [K, D] of the teacher's last layer."""
    center: Tensor
    """The moving centre or Sinkhorn's potentials [K]."""
    temp: float

    @property
    def shape(self) -> torch.Size:
        """The shape of the features [..., D]."""
        return self.features.shape

    def view(self, *shape: int) -> Targets:
        """Return the rows in another shape."""
        return self._with(lambda rows: rows.view(*shape))

    def flatten(self, start: int = 0, end: int = -1) -> Targets:
        """Return the rows with the dimensions from ``start`` to ``end`` as one."""
        return self._with(lambda rows: rows.flatten(start, end))

    def unflatten(self, dim: int, sizes: Sequence[int]) -> Targets:
        """Return the rows with a dimension split into several."""
        return self._with(lambda rows: rows.unflatten(dim, tuple(sizes)))  # type: ignore[no-untyped-call]

    def squeeze(self, dim: int) -> Targets:
        """Return the rows without a dimension of length 1."""
        return self._with(lambda rows: rows.squeeze(dim))

    def unsqueeze(self, dim: int) -> Targets:
        """Return the rows with a further dimension of length 1."""
        return self._with(lambda rows: rows.unsqueeze(dim))

    def chunk(self, chunks: int) -> list[Targets]:
        """Return parts along the first dimension."""
        return [replace(self, features=part) for part in self.features.chunk(chunks)]

    def __getitem__(self, index: int | slice) -> Targets:
        return self._with(lambda rows: rows[index])

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self) -> Iterator[Targets]:
        return (self[number] for number in range(len(self)))

    def _with(self, change: Callable[[Tensor], Tensor]) -> Targets:
        return replace(self, features=change(self.features))


class LastLayer(nn.Module):
    """Holds the last layer of a head, and returns the layer's input.

    The layer stays in the head, so that optimizer, teacher and checkpoints have it. Its weight is taken during the
    head's forward pass, where weight normalisation computes it and FSDP has gathered it.
    """

    weight: Tensor | None = None
    """The weight [K, D] of the last forward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if getattr(layer, "bias", None) is not None:
            raise ValueError("last_layer: must have no bias, because prototypes have none")
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the input."""
        layer: Any = self.layer
        layer(x[:0])  # runs the hooks that compute or gather the weight, on no rows
        self.weight = layer.weight
        return x

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "weight": None}  # a copy of the head computes its own


def without_logits(loss: Teacher, student_head: nn.Module, teacher_head: nn.Module) -> None:
    """Let two heads return the input of their ``last_layer``, and give a loss the layers.

    A head that has been changed before, because two losses share it, stays as it is. Call it before the optimizer is
    built: the names of the layer's parameters get ``layer.`` in them. Raise ValueError for a last layer with a bias.
    """
    for head in (student_head, teacher_head):
        changed: Any = head
        if not isinstance(changed.last_layer, LastLayer):
            changed.last_layer = LastLayer(changed.last_layer)
    student: Any = student_head
    teacher: Any = teacher_head
    loss.layers = (student.last_layer, teacher.last_layer)


class Teacher(MovingCenter):
    """What the losses of both variables share: the teacher's assignments, centred or balanced by Sinkhorn."""

    layers: tuple[LastLayer, LastLayer] | None = None
    """The last layers of student and teacher. They are modules of the heads, not of the loss."""

    def _prototypes(self, argument: Tensor | None, *, teacher: bool) -> Tensor | None:
        """Return the caller's argument, or else the weight of the layer, if there are layers."""
        return argument if argument is not None or self.layers is None else self.layers[teacher].weight

    @torch.no_grad()
    def softmax_center_teacher(
        self,
        teacher_output: Tensor,
        teacher_temp: float,
        update_centers: bool = True,
        *,
        teacher_prototypes: Tensor | None = None,
    ) -> Tensor | Targets:
        """Return ``softmax((logits - center) / teacher_temp)`` for logits [..., K], or Targets for features [..., D].

        ``update_centers`` of DINOv3 has no effect: :meth:`update_center` has moved the centre already.
        """
        assert self.center is not None
        prototypes = self._prototypes(teacher_prototypes, teacher=True)
        if prototypes is not None:
            center = self.center.flatten().clone()  # the buffer moves before the targets are used
            return Targets(teacher_output.detach(), prototypes.detach(), center, teacher_temp)
        return ((at_least_single(teacher_output) - self.center.flatten()) / teacher_temp).softmax(-1)

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor, *, teacher_prototypes: Tensor | None = None) -> None:
        """Move the centre towards the mean of the teacher's logits [..., K], or of features [..., D] of all ranks."""
        super().update_center(teacher_output, teacher_prototypes=self._prototypes(teacher_prototypes, teacher=True))

    @torch.no_grad()
    def _balanced(self, output: Tensor, temp: float, iterations: int, prototypes: Tensor | None) -> Tensor | Targets:
        """Return Sinkhorn's assignments of the rows of all ranks."""
        prototypes = self._prototypes(prototypes, teacher=True)
        if prototypes is None:
            return sinkhorn(output, epsilon=temp, iterations=iterations, group=self.group, backend=self.backend)
        center = prototype_sinkhorn_center(
            output.detach(), prototypes.detach(), epsilon=temp, iterations=iterations, group=self.group
        )
        return Targets(output.detach(), prototypes.detach(), center, temp)


class DINOLoss(Teacher):
    """Cross-entropy of [CLS] assignments, in nats, with the interface of ``dinov2.loss.DINOLoss``.

    ``center`` is a buffer [1, out_dim]. It moves in :meth:`update_center`, not at the next use as in DINOv2's code, so
    a checkpoint between the two has it. If a process group is started, centre and Sinkhorn are over the rows of all
    ranks.

    Raise ValueError for a temperature that is not positive, or a momentum outside [0, 1].
    """

    def __init__(
        self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9, *, backend: Backend = "auto"
    ) -> None:
        super().__init__((1, out_dim), student_temp, center_momentum, backend)

    def sinkhorn_knopp_teacher(
        self,
        teacher_output: Tensor,
        teacher_temp: float,
        n_iterations: int = 3,
        *,
        teacher_prototypes: Tensor | None = None,
    ) -> Tensor | Targets:
        """Return Sinkhorn's assignments of logits [N, K], or Targets for features [N, D]."""
        return self._balanced(teacher_output, teacher_temp, n_iterations, teacher_prototypes)

    def forward(
        self,
        student_output_list: Sequence[Tensor],
        teacher_out_softmaxed_centered_list: Sequence[Tensor] | Tensor | Targets | Sequence[Targets],
        *,
        student_prototypes: Tensor | None = None,
    ) -> Tensor:
        """Return the *sum* over all pairs of a student's and a teacher's view of their mean cross-entropy; a scalar.

        Logits [B, K] of the student go with assignments [B, K] of the teacher, and features [B, D] with Targets and
        ``student_prototypes`` [K, D]. Raise ValueError for one without the other.
        """
        targets = _joined(teacher_out_softmaxed_centered_list)
        students = torch.stack(list(student_output_list))
        prototypes = self._prototypes(student_prototypes, teacher=False)
        return sum_of_pairs(students, targets, prototypes, self.student_temp, self.backend)


class iBOTPatchLoss(Teacher):  # noqa: N801 - the name in facebookresearch/dinov2
    """Cross-entropy of patch assignments, in nats, with the interface of ``dinov2.loss.iBOTPatchLoss``.

    ``center`` is a buffer [1, 1, patch_out_dim]; see :class:`DINOLoss`.
    """

    def __init__(
        self, patch_out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9, *, backend: Backend = "auto"
    ) -> None:
        super().__init__((1, 1, patch_out_dim), student_temp, center_momentum, backend)

    def sinkhorn_knopp_teacher(
        self,
        teacher_output: Tensor,
        teacher_temp: float,
        n_masked_patches_tensor: Tensor | None = None,
        n_iterations: int = 3,
        *,
        teacher_prototypes: Tensor | None = None,
    ) -> Tensor | Targets:
        """Return Sinkhorn's assignments of logits [N, K], or Targets for features [N, D].

        The number of masked patches cancels in the assignments and is not used. The ranks may have different numbers.
        """
        return self._balanced(teacher_output, teacher_temp, n_iterations, teacher_prototypes)

    def forward(
        self,
        student_patch_tokens: Tensor,
        teacher_patch_tokens: Tensor | Targets,
        student_masks_flat: Tensor,
        *,
        student_prototypes: Tensor | None = None,
    ) -> Tensor:
        """Return the mean over images of the mean over their masked patches; tokens [B, N, K] and masks [B, N]."""
        masks = student_masks_flat.bool()
        weight = masks / masks.sum(1, keepdim=True).clamp(min=1)
        rows = student_patch_tokens.flatten(0, 1)
        return self._rows(rows, teacher_patch_tokens.flatten(0, 1), weight.flatten(), len(masks), student_prototypes)

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,
        teacher_patch_tokens_masked: Tensor | Targets,
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
        *,
        student_prototypes: Tensor | None = None,
    ) -> Tensor:
        """Return the same loss from the masked patches' rows only, [M, K], or [M, D] with Targets and prototypes.

        ``student_masks_flat`` [B, N] has M true entries. Only the first ``n_masked_patches`` rows count, if given;
        ``masks_weight`` is 1 / number of masked patches of the row's image by default.
        """
        masks = student_masks_flat.bool()
        if masks_weight is None:
            masks_weight = (1 / masks.sum(1, keepdim=True).clamp(min=1)).expand(masks.shape)[masks]
        rows = student_patch_tokens_masked[:n_masked_patches]
        targets = teacher_patch_tokens_masked[:n_masked_patches]
        return self._rows(rows, targets, masks_weight, len(masks), student_prototypes)

    def _rows(
        self, rows: Tensor, targets: Tensor | Targets, weight: Tensor, images: int, prototypes: Tensor | None
    ) -> Tensor:
        """Return ``sum_i weight_i CE_i / images``."""
        prototypes = self._prototypes(prototypes, teacher=False)
        check_kinds(targets, prototypes)
        if isinstance(targets, Targets):
            assert prototypes is not None
            total = weight.sum()
            mean = patch_cross_entropy(
                rows,
                targets.features,
                prototypes,
                targets.prototypes,
                student_temp=self.student_temp,
                teacher_temp=targets.temp,
                center=targets.center,
                weight=weight,
                backend=self.backend,
            )
            return mean * total / images
        log_p = (at_least_single(rows) / self.student_temp).log_softmax(-1)
        return -(weight * (targets.to(log_p.dtype) * log_p).sum(-1)).sum() / images


def check_kinds(targets: Tensor | Targets, prototypes: Tensor | None) -> None:
    """Raise ValueError unless Targets come with the student's prototypes, and tensors without."""
    if isinstance(targets, Targets) != (prototypes is not None):
        raise ValueError("give both teacher_prototypes and student_prototypes, or neither")


def sum_of_pairs(
    students: Tensor,
    targets: Tensor | Targets,
    prototypes: Tensor | None,
    student_temp: float,
    backend: Backend = "auto",
    *,
    same_view: bool = True,
) -> Tensor:
    """Return the sum over views s and t of the mean cross-entropy of students [S, B, ...] with targets [T, B, ...].

    Without ``same_view`` the pairs s = t are left out.
    """
    check_kinds(targets, prototypes)
    if not isinstance(targets, Targets):
        log_p = (at_least_single(students) / student_temp).log_softmax(-1)
        crossed = -torch.einsum("sbk,tbk->st", log_p, targets.to(log_p.dtype)) / students.shape[1]
        return crossed.sum() if same_view else (crossed.sum() - crossed.diagonal().sum())
    few = min(len(students), len(targets))
    options: dict[str, Any] = {
        "student_temp": student_temp,
        "teacher_temp": targets.temp,
        "center": targets.center,
        "backend": backend,
    }
    total = students.new_zeros((), dtype=torch.promote_types(students.dtype, torch.float32))
    assert prototypes is not None
    weights = (prototypes, targets.prototypes)
    if pairs := len(students) * len(targets) - few:
        total = total + pairs * prototype_cross_entropy(students, targets.features, *weights, **options)
    if same_view:
        student, teacher = students[:few].flatten(0, 1), targets.features[:few].flatten(0, 1)
        total = total + few * patch_cross_entropy(student, teacher, *weights, **options)
    return total


def _joined(targets: Sequence[Tensor] | Tensor | Targets | Sequence[Targets]) -> Tensor | Targets:
    """Return a list of views as one object with the views in the first dimension."""
    if isinstance(targets, Tensor | Targets):
        return targets
    first = targets[0]
    if isinstance(first, Targets):
        return replace(first, features=torch.stack([one.features for one in targets]))  # type: ignore[union-attr]
    return torch.stack(list(targets))  # type: ignore[arg-type]
