"""Train stable-pretraining's SimCLR with the loss of fasttrain."""

import lightning as pl
import stable_pretraining as spt
import torch
from digits import TwoViews, network
from stable_pretraining.forward import simclr

from fasttrain.losses import NTXentLoss  # instead of: spt.losses.NTXEntLoss


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.values.append(float(outputs["loss"]))


def collate(samples: list[tuple[torch.Tensor, torch.Tensor, int]]) -> dict[str, list[dict[str, torch.Tensor]]]:
    return {"views": [{"image": torch.stack([sample[view] for sample in samples])} for view in (0, 1)]}


def main(steps: int = 100) -> list[float]:
    pl.seed_everything(0)
    loader = torch.utils.data.DataLoader(TwoViews(), batch_size=64, shuffle=True, drop_last=True, collate_fn=collate)
    module = spt.Module(
        forward=simclr,
        backbone=network(),
        projector=torch.nn.Linear(64, 32),
        simclr_loss=NTXentLoss(temperature=0.2),
        optim={"optimizer": {"type": "AdamW", "lr": 1e-3}},
    )
    losses = Losses()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_steps=steps, accelerator="auto", devices=1, callbacks=[losses], **quiet)
    trainer.fit(module, loader)
    return losses.values


if __name__ == "__main__":
    print(main())
