"""What iBOT and DINOv2 share: self-distillation of [CLS] across views, and of masked patches within a view."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import prototype_entropy
from ..kernels.collectives import mean_over_ranks
from ..kernels.normalize import normalize_rows
from ..kernels.precision import at_least_single
from ..losses import DINOLoss, iBOTPatchLoss
from ..models.heads import Prototypes, projection_mlp, trunc_normal_linears
from ..models.tokens import MaskToken, patch_grid, patch_width, tokens_of
from .base import Objective, Step, Task
from .bound import PrototypeMethod, in_product_dtype
from .branch import Branch, slice_views
from .masks import MaskedPatches, Masking, masked_patches


class Pair(NamedTuple):
    """One value for [CLS] and one for the patches."""

    cls: Any
    patch: Any


class TokenBranch(Branch):
    """A branch whose backbone's patch tokens are used, some of them hidden behind a mask token.

    With one head or one set of prototypes, [CLS] and patches share it. Else they are named "cls" and "patch".
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module | Mapping[str, nn.Module],
        prototypes: Prototypes | Mapping[str, Prototypes],
    ) -> None:
        super().__init__(backbone, head, prototypes)
        self.mask_token = MaskToken(patch_width(backbone))

    def tokens(self, views: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> Pair:
        """Return the features [V * B, D] and the patches [rows, D] of views grouped by resolution.

        ``masks`` has one mask [V_g * B, N_g] per group.
        """
        each = [
            tokens_of(
                self.backbone,
                group.flatten(0, 1),
                mask=None if masks is None else masks[number],
                mask_token=None if masks is None else self.mask_token,
            )
            for number, group in enumerate(views)
        ]
        return Pair(torch.cat([t.features for t in each]), torch.cat([t.patches.flatten(0, 1) for t in each]))

    def project(self, features: Tensor, patches: Tensor) -> Pair:
        """Return the unit-norm projections of features and of patches, in fp32. A shared head runs once."""
        if isinstance(self.head, nn.ModuleDict):
            rows = Pair(self.head["cls"](features), self.head["patch"](patches))
        else:
            rows = Pair(*self.head(torch.cat([features, patches])).split([len(features), len(patches)]))
        return Pair(*(normalize_rows(at_least_single(part)) for part in rows))

    def prototype_rows(self) -> Pair:
        """Return the prototypes [K, D] of [CLS] and of the patches."""
        if not isinstance(self.prototypes, nn.ModuleDict):
            rows = self.prototypes()
            return Pair(rows, rows)
        each = {name: prototypes() for name, prototypes in self.prototypes.items()}
        return Pair(each["cls"], each.get("patch", each["cls"]))


class MaskedMethod(PrototypeMethod):
    """A student sees masked global crops and whole local crops; its teacher sees whole global crops.

        loss = cls_weight CE([CLS], the teacher's [CLS] of another view)
             + patch_weight CE(masked patches, the teacher's patches at their places)

    The twin subtracts from each cross-entropy the entropy of its mean assignment. A subclass sets ``student``,
    ``teacher``, ``loss`` and ``patch_loss``.
    """

    family: ClassVar[str | None] = "distillation"
    has_teacher: ClassVar[bool] = True
    zero_init_residual: ClassVar[bool] = False
    needs_patches: ClassVar[bool] = True
    center_of_all_patches: ClassVar[bool] = False
    """Whether the centre follows all patches of the teacher, and not only the student's masked patches."""

    loss: DINOLoss
    patch_loss: iBOTPatchLoss

    def __init__(self, settings: Any, task: Task, backbone: nn.Module, masking: Masking) -> None:
        super().__init__(settings, task)
        self.masking, self.seed = masking, task.seed
        sizes = [view.size for view in task.views.each[: self.n_global]]
        self.grids = [(len(list(run)), patch_grid(backbone, size)) for size, run in groupby(sizes)]
        masking.check([grid for _, grid in self.grids])

    @abstractmethod
    def temperatures(self, step: Step) -> Pair:
        """Return the teacher's temperatures at a step."""

    @abstractmethod
    def term_weights(self) -> Pair:
        """Return the weights of the two cross-entropies."""

    @abstractmethod
    def prototype_counts(self) -> Pair:
        """Return the numbers of prototypes."""

    @property
    def prototype_count(self) -> int:
        """The number of prototypes of [CLS]."""
        return int(self.prototype_counts().cls)

    def centers(self, teacher: Pair, prototypes: Pair, temperatures: Pair) -> Pair:
        """Return centres that replace the moving ones for this batch, from the teacher's rows; None keeps them."""
        return Pair(None, None)

    def further_terms(
        self, features: Tensor, patches: Tensor, crops: Sequence[Tensor], step: Step
    ) -> dict[str, tuple[float, Tensor]]:
        """Return the weights and values of further terms of the loss, by name.

        ``features`` [V, B, D] and ``patches`` [rows, D] are the student's of the global ``crops``.
        """
        return {}

    def masks_at(self, step: Step, batch: int) -> MaskedPatches:
        """Return the masks of this rank's ``batch`` images, on the host."""
        rank, ranks = (0, 1) if self.group is None else (self.group.rank(), self.group.size())
        first = (step.micro * ranks + rank) * batch
        return masked_patches(self.masking, self.grids, seed=self.seed, step=step.index, first=first, batch=batch)

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """Return the two cross-entropies, or the twin's objective."""
        crops, local = slice_views(views, 0, self.n_global), slice_views(views, self.n_global)
        batch = views[0].shape[1]
        masked = self.masks_at(step, batch).to(views[0].device)
        features, patches = self.student.tokens(crops, masked.masks)
        further = self.further_terms(features.unflatten(0, (-1, batch)), patches, crops, step)
        if local:
            features = torch.cat([features, self.student.tokens(local).cls])
        student, prototypes = self.student.project(features, patches[masked.rows]), self.student.prototype_rows()
        with torch.no_grad():
            teacher, every_patch = self._teacher(crops, masked)
            teacher_prototypes = self.teacher.prototype_rows()
            temperatures = self.temperatures(step)
            centers = self.centers(Pair(teacher.cls, teacher.patch[: masked.count]), teacher_prototypes, temperatures)
        measure = self.entropy or step.measure
        projections = student.cls.unflatten(0, (-1, batch))
        targets = teacher.cls.unflatten(0, (-1, batch))
        reconstruction, _ = self.loss.terms(
            *in_product_dtype(projections, targets, prototypes.cls, teacher_prototypes.cls),
            teacher_temp=temperatures.cls,
            center=centers.cls,
            entropy=False,
        )
        patch_reconstruction = self.patch_loss.weighted_sum(
            *in_product_dtype(student.patch, teacher.patch, prototypes.patch, teacher_prototypes.patch),
            weight=masked.weight,
            teacher_temp=temperatures.patch,
            center=centers.patch,
        )
        self.loss.update_center(targets, teacher_prototypes=teacher_prototypes.cls)
        self.patch_loss.update_center(every_patch, teacher_prototypes=teacher_prototypes.patch)
        entropies = self._entropies(student, prototypes, temperatures, masked.weight) if measure else Pair(None, None)
        objective = self.prototype_objective(reconstruction, entropies.cls, projections, step)
        share = mean_over_ranks(masked.weight.sum().to(reconstruction), self.group) if measure else None
        return self._with_patches(objective, patch_reconstruction, entropies.patch, share, further)

    def _entropies(self, student: Pair, prototypes: Pair, temperatures: Pair, weight: Tensor) -> Pair:
        """Return the entropies of the student's mean assignments at the teacher's temperatures, over all ranks.

        The reconstruction's targets have these temperatures. With H(mean) at the student's, which is higher, the bound
        would be wrong: a student with one assignment for all images, a peak above a flat rest, would have a large H
        and a small cross-entropy with its own sharpened self. At the teacher's, no constant has information.
        """
        each = [
            prototype_entropy(
                *in_product_dtype(rows, columns), temp=temp, weight=of_rows, group=self.group, check_batches=False
            )[0]
            for rows, columns, temp, of_rows in zip(student, prototypes, temperatures, (None, weight), strict=True)
        ]
        return Pair(*each)

    def _teacher(self, crops: Sequence[Tensor], masked: MaskedPatches) -> tuple[Pair, Tensor]:
        """Return the teacher's projections of [CLS] and of the masked patches, and the patches for the centre."""
        features, patches = self.teacher.tokens(crops)
        if self.center_of_all_patches and self.patch_loss.center is not None:
            teacher = self.teacher.project(features, patches)
            return Pair(teacher.cls, teacher.patch[masked.rows]), teacher.patch
        teacher = self.teacher.project(features, patches[masked.rows])
        return teacher, teacher.patch[: masked.count]

    def _with_patches(
        self,
        objective: Objective,
        reconstruction: Tensor,
        entropy: Tensor | None,
        share: Tensor | None,
        further: Mapping[str, tuple[float, Tensor]],
    ) -> Objective:
        """Return the objective of [CLS] with the terms of the patches and further ones."""
        weights, logs = self.term_weights(), dict(objective.logs)
        loss = reconstruction
        if self.entropy and entropy is not None and share is not None:
            loss = reconstruction - share * entropy
        loss = weights.cls * objective.loss + weights.patch * loss
        for weight, value in further.values():
            loss = loss + weight * value
        if entropy is not None and share is not None:
            # ``share`` is the mean of all ranks, so that the mean of the logs over the ranks is the patches' mean.
            mean = reconstruction.detach() / share.clamp_min(torch.finfo(share.dtype).tiny)
            logs |= {
                "patch_entropy": entropy.detach(),
                "patch_reconstruction": mean,
                "patch_information": entropy.detach() - mean,
                "patch_deficit": math.log(self.prototype_counts().patch) - entropy.detach(),
                "masked_share": share,
            }
            logs |= {name: value.detach() for name, (_, value) in further.items()}
        return objective._replace(loss=loss, logs=logs)


def dino_head(width: int, hidden: int, dim: int) -> nn.Sequential:
    """Return the head of the three papers: three layers with GELU, as initialised there."""
    head = projection_mlp((width, hidden, hidden, dim), batch_norm=False, activation=nn.GELU)
    trunc_normal_linears(head)
    return head
