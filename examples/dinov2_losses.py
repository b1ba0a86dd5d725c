"""Save the logits in facebookresearch/dinov2's or dinov3's trainer: one import and one line.

``SmallMetaArch`` has the parts of ``ssl_meta_arch.SSLMetaArch`` that matter here, with its calls.
"""

import copy

import torch
from digits import TwoViews, batches, network
from torch import nn
from torch.nn.functional import normalize

from fasttrain.losses.compat.dinov2 import (
    DINOLoss,
    KoLeoLoss,
    without_logits,
)  # instead of dinov2.loss


class DINOHead(nn.Module):
    def __init__(self, width: int, out_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 256), nn.BatchNorm1d(256), nn.GELU(), nn.Linear(256, 32))
        self.last_layer = nn.utils.parametrizations.weight_norm(nn.Linear(32, out_dim, bias=False))
        norms = self.last_layer.parametrizations.weight.original0
        nn.init.ones_(norms).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last_layer(normalize(self.mlp(x), dim=-1))


class SmallMetaArch(nn.Module):
    def __init__(self, out_dim: int = 64) -> None:
        super().__init__()
        backbone = network()
        self.student = nn.ModuleDict({"backbone": backbone, "dino_head": DINOHead(64, out_dim)})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.dino_loss, self.koleo_loss = DINOLoss(out_dim), KoLeoLoss()
        # The new line. The heads now return features instead of logits, which matters with DINOv2's 65,536 prototypes.
        without_logits(self.dino_loss, self.student["dino_head"], self.teacher["dino_head"])

    def forward(self, x0: torch.Tensor, x1: torch.Tensor, teacher_temp: float) -> torch.Tensor:
        views = torch.cat([x0, x1])
        with torch.no_grad():
            after_head = self.teacher["dino_head"](self.teacher["backbone"](torch.cat([x1, x0])))
            targets = self.dino_loss.sinkhorn_knopp_teacher(after_head, teacher_temp=teacher_temp)
        features = self.student["backbone"](views)
        student = self.student["dino_head"](features)
        loss = self.dino_loss(student_output_list=[student], teacher_out_softmaxed_centered_list=[targets])
        return loss + 0.1 * sum(self.koleo_loss(part) for part in features.chunk(2))

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            old.lerp_(new, 1 - momentum)


def main(steps: int = 100) -> list[float]:
    torch.manual_seed(0)
    model = SmallMetaArch()
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=3e-3)
    loader = torch.utils.data.DataLoader(TwoViews(), batch_size=64, shuffle=True, drop_last=True)
    losses: list[float] = []
    for x0, x1, _ in batches(loader, steps):
        loss = model(x0, x1, teacher_temp=0.03)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_teacher(0.95)
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(main())
