"""The peer: lightly's dataset, transforms, heads, losses and EMA in the PyTorch loop of its examples."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightly.data import LightlyDataset
from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss, SwaVLoss
from lightly.models.modules import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    DINOProjectionHead,
    SimCLRProjectionHead,
    SwaVProjectionHead,
    SwaVPrototypes,
)
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import BYOLTransform, BYOLView1Transform, DINOTransform, SimCLRTransform, SwaVTransform
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fasttrain.config.resolve import Config
from fasttrain.models.architectures import create_backbone
from fasttrain.pipelines import ViewRecipe, open_source

from .clock import Side

_WORKERS = 2


class Peer(Side):
    log_every = 1  # the loss is read at every step

    def __init__(self, config: Config) -> None:
        t = config.train
        torch.manual_seed(t.seed)
        root = Path(str(t.data_path))  # lightly would use every image in it, also the held-out images in test/
        folder = root / "train" if (root / "train").is_dir() else root
        dataset = LightlyDataset(str(folder), transform=transform(config.method, config.views))
        images = len(open_source(t.data_path, t.val_path).train)
        if len(dataset) != images:
            raise SystemExit(f"--data_path: lightly sees {len(dataset)} images, ours {images}. Give a folder train/.")
        self.loader = DataLoader(
            dataset, batch_size=t.batch_size_per_gpu, shuffle=True, drop_last=True, num_workers=_WORKERS
        )
        backbone = create_backbone(t.arch, in_chans=config.views.channels, img_size=config.views.views[0].size)
        self.model: Model = MODELS[config.method](backbone, config.settings)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in trained)
        lr = t.lr * t.batch_size_per_gpu / 256
        self.optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=t.weight_decay)
        self.watch(self.optimizer)
        self.clip, self.total = t.clip_grad, 0.0
        self.cached: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def batches(self) -> Iterator[Any]:
        yield from self.loader

    def keep(self, batch: Any) -> None:
        self.cached = batch[0]

    def network(self) -> None:
        _, outputs = self.model.outputs(self.cached)
        if not self.gradients:
            count = sum(output.numel() for output in outputs)
            self.gradients = [torch.randn_like(output) / count for output in outputs]
        torch.autograd.backward(outputs, self.gradients)
        self.optimizer.zero_grad()

    def step(self, batch: Any = None, *, log: bool) -> None:
        views = self.cached if batch is None else batch[0]
        self.model.before()
        teacher, student = self.model.outputs(views)
        loss = self.model.loss(teacher, student)
        loss.backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.total += loss.item()


class Model(nn.Module):
    """A method of lightly's examples: an action ``before`` each step, the outputs per view, and the loss."""

    backbone: nn.Module
    """The network whose features are evaluated."""
    momentum = 0.0

    def before(self) -> None:
        """Run the start of the example's step."""

    def outputs(self, views: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs of teacher and student, with one forward pass per view."""
        return [], [self(view) for view in views]

    def loss(self, teacher: list[Tensor], student: list[Tensor]) -> Tensor:
        raise NotImplementedError


class _SimCLR(Model):
    def __init__(self, backbone: nn.Module, settings: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection_head = SimCLRProjectionHead(backbone.num_features, settings.hidden_dim, settings.out_dim)
        self.criterion = NTXentLoss(temperature=settings.temperature)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def loss(self, teacher: list[Tensor], student: list[Tensor]) -> Tensor:
        return self.criterion(*student)


class _SwaV(Model):
    def __init__(self, backbone: nn.Module, s: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection_head = SwaVProjectionHead(backbone.num_features, s.hidden_dim, s.out_dim)
        self.prototypes = SwaVPrototypes(s.out_dim, n_prototypes=s.nmb_prototypes)
        self.criterion = SwaVLoss(s.temperature, s.sinkhorn_iterations, s.epsilon)

    def before(self) -> None:
        self.prototypes.normalize()

    def forward(self, x: Tensor) -> Tensor:
        x = self.projection_head(self.backbone(x).flatten(start_dim=1))
        return self.prototypes(nn.functional.normalize(x, dim=1, p=2))

    def loss(self, teacher: list[Tensor], student: list[Tensor]) -> Tensor:
        return self.criterion(student[:2], student[2:])


class _DINO(Model):
    def __init__(self, backbone: nn.Module, s: Any) -> None:
        super().__init__()
        dims = (backbone.num_features, s.hidden_dim, s.bottleneck_dim, s.out_dim)
        self.student_backbone, self.teacher_backbone = backbone, copy.deepcopy(backbone)
        self.backbone = self.teacher_backbone
        self.student_head, self.teacher_head = (
            DINOProjectionHead(*dims, batch_norm=s.use_bn_in_head, norm_last_layer=s.norm_last_layer) for _ in range(2)
        )
        deactivate_requires_grad(self.teacher_backbone)
        deactivate_requires_grad(self.teacher_head)
        self.momentum = s.momentum_teacher
        self.criterion = DINOLoss(
            s.out_dim, s.warmup_teacher_temp, s.teacher_temp, 0, s.student_temp, s.center_momentum
        )

    def before(self) -> None:
        update_momentum(self.student_backbone, self.teacher_backbone, m=self.momentum)
        update_momentum(self.student_head, self.teacher_head, m=self.momentum)

    def outputs(self, views: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        teacher = [self.teacher_head(self.teacher_backbone(view).flatten(start_dim=1)) for view in views[:2]]
        return teacher, [self.student_head(self.student_backbone(view).flatten(start_dim=1)) for view in views]

    def loss(self, teacher: list[Tensor], student: list[Tensor]) -> Tensor:
        return self.criterion(teacher, student, epoch=1)


class _BYOL(Model):
    def __init__(self, backbone: nn.Module, s: Any) -> None:
        super().__init__()
        self.online = nn.Sequential(backbone, BYOLProjectionHead(backbone.num_features, s.hidden_dim, s.out_dim))
        self.target = copy.deepcopy(self.online)
        self.backbone = self.target[0]
        self.predictor = BYOLPredictionHead(s.out_dim, s.hidden_dim, s.out_dim)
        deactivate_requires_grad(self.target)
        self.momentum = s.momentum_teacher
        self.criterion = NegativeCosineSimilarity()

    def before(self) -> None:
        update_momentum(self.online, self.target, m=self.momentum)

    def outputs(self, views: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        with torch.no_grad():
            targets = [self.target(view) for view in views]
        return targets, [self.predictor(self.online(view)) for view in views]

    def loss(self, teacher: list[Tensor], student: list[Tensor]) -> Tensor:
        return 0.5 * (self.criterion(student[0], teacher[1]) + self.criterion(student[1], teacher[0]))


MODELS: dict[str, type[Model]] = {"simclr": _SimCLR, "swav": _SwaV, "dino": _DINO, "byol": _BYOL}


def transform(method: str, recipe: ViewRecipe) -> Any:
    """Return the method's transform with the sizes, areas, colours, grey and flips of the recipe, without blur."""
    views = recipe.views
    first, last = views[0], views[-1]
    jitter = dict(zip(("cj_bright", "cj_contrast", "cj_sat", "cj_hue"), first.jitter, strict=True))
    shared = {
        **jitter,
        "cj_prob": first.jitter_p,
        "cj_strength": 1.0,
        "random_gray_scale": first.grey,
        "hf_prob": first.flip,
        "normalize": {"mean": list(recipe.mean), "std": list(recipe.std)},
    }
    if method == "byol":
        each = [
            BYOLView1Transform(v.size, min_scale=v.scale[0], gaussian_blur=0.0, solarization_prob=v.solarize, **shared)
            for v in views
        ]
        return BYOLTransform(*each)
    if method == "simclr":
        return SimCLRTransform(first.size, min_scale=first.scale[0], gaussian_blur=0.0, **shared)
    if method == "swav":
        low, high = zip(*(view.scale for view in views), strict=True)
        counts = tuple(view.count for view in views)
        sizes = tuple(view.size for view in views)
        return SwaVTransform(sizes, counts, low, high, gaussian_blur=0.0, **shared)
    return DINOTransform(
        first.size,
        first.scale,
        last.size,
        last.scale,
        n_local_views=last.count,
        gaussian_blur=(0.0, 0.0, 0.0),
        solarization_prob=0.0,
        **shared,
    )
