"""Train SimCLR with lightly and PyTorch Lightning. Only the import of the loss differs from lightly's example."""

import pytorch_lightning as pl
import torch
from digits import TwoViews, network
from lightly.models.modules import SimCLRProjectionHead

from fasttrain.losses import NTXentLoss  # instead of: from lightly.loss import NTXentLoss


class SimCLR(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = network()
        self.projection_head = SimCLRProjectionHead(64, 64, 32)
        self.criterion = NTXentLoss(temperature=0.2)
        self.losses: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection_head(self.backbone(x))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x0, x1, _ = batch
        loss = self.criterion(self(x0), self(x1))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(steps: int = 100) -> list[float]:
    pl.seed_everything(0)
    loader = torch.utils.data.DataLoader(TwoViews(), batch_size=64, shuffle=True, drop_last=True)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    model = SimCLR()
    pl.Trainer(max_steps=steps, accelerator="auto", devices=1, **quiet).fit(model, loader)
    return model.losses


if __name__ == "__main__":
    print(main())
