"""iBOT and DINOv2, written out; only the draws of the masks are the method's."""

import copy
from types import SimpleNamespace

import torch

from tests.methods.official import Official, entropy_of_mean, mean, unit
from tests.methods.official_clustering import sinkhorn


class Masked(Official):
    def __init__(self, method):
        super().__init__(method)
        self.draw = method.masks_at

    def tokens(self, branch, images, mask=None):
        """[CLS] and patches after the last norm; the mask token replaces hidden patches before the positions."""
        vit = branch.backbone
        x = vit.patch_embed(images)
        if mask is not None:
            x = torch.where(mask.view(x.shape[:-1])[..., None], branch.mask_token.weight[0], x)
        x = vit.norm(vit.blocks(vit._pos_embed(x)))
        return x[:, 0], x[:, 1:]

    def seen(self, views, step):
        """[CLS] of every student view and patches of the global ones; the teacher's; and the masks [V, B, N]."""
        batch = views[0].shape[1]
        (masks,) = self.draw(step, batch).masks
        crops, local = views[0].flatten(0, 1), [group.flatten(0, 1) for group in views[1:]]
        cls, patches = self.tokens(self.student, crops, masks)
        cls = torch.cat([cls, *(self.tokens(self.student, group)[0] for group in local)])
        with torch.no_grad():
            teacher_cls, teacher_patches = self.tokens(self.teacher, crops)
        shape = (-1, batch)
        return [x.unflatten(0, shape) for x in (cls, patches, teacher_cls, teacher_patches, masks)]

    def cross_entropies(self, cls, patches, targets, patch_targets, masks):
        """The authors' loops over views: [CLS] with the other views, patches with their own."""
        of_cls, of_patches = [], []
        for q, target in enumerate(targets):
            for v, logits in enumerate(cls):
                if v != q:
                    of_cls.append(-(target * logits.log_softmax(-1)).sum(-1).mean())
                else:
                    each = -(patch_targets[q] * patches[v].log_softmax(-1)).sum(-1)
                    of_patches.append(((each * masks[v]).sum(1) / masks[v].sum(1).clamp(min=1)).mean())
        return mean(of_cls), mean(of_patches)

    def patch_entropy(self, patches, masks):
        """The entropy of the mean prediction, every masked crop counting as much, times the share of such crops."""
        counts = masks.sum(-1)
        each = (patches.softmax(-1) * masks[..., None]).sum(2)[counts > 0] / counts[counts > 0][:, None]
        p = each.mean(0)
        return -(p * p.log()).sum() * (counts > 0).double().mean()


class IBOT(Masked):
    def __init__(self, method):
        super().__init__(method)
        if not self.settings.no_centering:
            counts = {"loss.center": (1, 1, len(method.loss.center.flatten()))}
            counts["patch_loss.center"] = (1, len(method.patch_loss.center.flatten()))
            self.kept = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in counts.items()}

    def logits(self, branch, cls, patches):
        """One MLP for all tokens; the last layer of patches is the one of [CLS], if it is shared."""
        last = branch.prototypes
        shared = not isinstance(last, torch.nn.ModuleDict)
        of_cls = last() if shared else last["cls"]()
        of_patches = of_cls if shared or "patch" not in last else last["patch"]()
        return unit(branch.head(cls)) @ of_cls.T, unit(branch.head(patches)) @ of_patches.T

    def loss(self, views, step, indices):
        s = self.settings
        cls, patches, teacher_cls, teacher_patches, masks = self.seen(views, step)
        cls, patches = (x / s.student_temp for x in self.logits(self.student, cls, patches))
        epoch, length = int(step.epoch), int(s.warmup_teacher_temp_epochs)
        warm = [
            torch.linspace(start, end, length, dtype=torch.float64)[epoch] if epoch < length else end
            for start, end in (
                (s.warmup_teacher_temp, s.teacher_temp),
                (s.warmup_teacher_patch_temp, s.teacher_patch_temp),
            )
        ]
        with torch.no_grad():
            teacher_cls, teacher_patches = self.logits(self.teacher, teacher_cls, teacher_patches)
            center, center2 = self.kept.get("loss.center", 0), self.kept.get("patch_loss.center", 0)
            targets = ((teacher_cls - center) / warm[0]).softmax(-1)
            patch_targets = ((teacher_patches - center2) / warm[1]).softmax(-1)
        of_cls, of_patches = self.cross_entropies(cls, patches, targets, patch_targets, masks)
        if self.kept:
            m, m2 = s.center_momentum, s.center_momentum2
            self.kept = {
                "loss.center": m * center + (1 - m) * teacher_cls.mean((0, 1)),
                "patch_loss.center": m2 * center2 + (1 - m2) * teacher_patches.mean((0, 1, 2)),
            }
        if self.twin:
            # The entropies are of assignments as sharp as the teacher's.
            of_cls = of_cls - entropy_of_mean(cls * s.student_temp / warm[0])
            of_patches = of_patches - self.patch_entropy(patches * s.student_temp / warm[1], masks)
        return s.lambda1 * of_cls + s.lambda2 * of_patches


class DINOv2(Masked):
    def __init__(self, method):
        super().__init__(method)
        if self.settings.gram_loss_weight:
            self.gram_teacher = copy.deepcopy(self.teacher.backbone)
        if self.settings.centering == "centering":
            counts = {"loss.center": (1, 1, len(method.loss.center.flatten()))}
            counts["patch_loss.center"] = (1, len(method.patch_loss.center.flatten()))
            self.kept = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in counts.items()}

    def logits(self, branch, cls, patches):
        if not self.settings.separate_head:
            return [unit(branch.head(x)) @ branch.prototypes().T for x in (cls, patches)]
        parts = (("cls", cls), ("patch", patches))
        return [unit(branch.head[name](x)) @ branch.prototypes[name]().T for name, x in parts]

    def loss(self, views, step, indices):
        s = self.settings
        cls, patches, teacher_cls, teacher_patches, masks = self.seen(views, step)
        crops, student_patches = cls[: self.count], patches
        cls, patches = (x / s.student_temp for x in self.logits(self.student, cls, patches))
        steps = int(s.warmup_teacher_temp_epochs * step.per_epoch)
        warm = torch.linspace(s.warmup_teacher_temp, s.teacher_temp, steps, dtype=torch.float64)
        temp = warm[step.index] if step.index < steps else s.teacher_temp
        with torch.no_grad():
            teacher_cls, teacher_patches = self.logits(self.teacher, teacher_cls, teacher_patches)
            masked = teacher_patches[masks]
            targets = self.assigned(teacher_cls.flatten(0, 1), "loss.center", temp).view_as(teacher_cls)
            patch_targets = torch.zeros_like(teacher_patches)
            patch_targets[masks] = self.assigned(masked, "patch_loss.center", temp)
        of_cls, of_patches = self.cross_entropies(cls, patches, targets, patch_targets, masks)
        for name, x in (("loss.center", teacher_cls.flatten(0, 1)), ("patch_loss.center", masked)):
            if name in self.kept:
                m = s.center_momentum
                self.kept[name] = m * self.kept[name] + (1 - m) * x.mean(0)
        if self.twin:
            of_cls = of_cls - entropy_of_mean(cls * s.student_temp / temp)
            of_patches = of_patches - self.patch_entropy(patches * s.student_temp / temp, masks)
        loss = s.dino_loss_weight * of_cls + s.ibot_loss_weight * of_patches
        if s.gram_loss_weight:
            loss = loss + s.gram_loss_weight * self.gram(views, step, student_patches)
        return loss if self.twin else loss + s.koleo_loss_weight * sum(koleo(view) for view in crops)

    def gram(self, views, step, patches):
        """The mean over crops of the squared differences of all cosines between two patches."""
        losses = []
        for crop, own in zip(views[0], patches, strict=True):
            with torch.no_grad():
                target = unit(self.tokens(SimpleNamespace(backbone=self.gram_teacher), crop)[1])
            own = unit(own)
            losses.append((own @ own.mT - target @ target.mT).square().mean())
        return mean(losses)

    def end_step(self, step):
        super().end_step(step)
        every = round(self.settings.gram_update_epochs * step.per_epoch)
        if every and (step.index + 1) % every == 0:
            self.gram_teacher.load_state_dict(self.teacher.backbone.state_dict())

    def assigned(self, logits, center, temp):
        """The teacher's softmax, centred or balanced over all its rows [N, K]."""
        if self.settings.centering == "sinkhorn_knopp":
            return sinkhorn(logits, temp, 3)
        return ((logits - self.kept.get(center, 0)) / temp).softmax(-1)


def koleo(x):
    """Minus the mean log distance of every unit row to its nearest other row."""
    x = unit(x)
    nearest = (x @ x.T - 2 * torch.eye(len(x))).argmax(1)
    return -((x - x[nearest] + 1e-8).norm(dim=1) + 1e-8).log().mean()
