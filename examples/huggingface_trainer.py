"""Train a ViT of transformers on the entropy-reconstruction bound, with the Trainer of transformers."""

import tempfile

import torch
from digits import TwoViews
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTModel, set_seed

from fasttrain.losses import EntropyReconstructionLoss


class TwoViewModel(nn.Module):
    """A ViT with a projection head. It returns a dictionary with ``loss``, as the Trainer requires."""

    def __init__(self) -> None:
        super().__init__()
        config = ViTConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            image_size=28,
            patch_size=7,
            num_channels=1,
        )
        self.backbone = ViTModel(config, add_pooling_layer=False)
        self.projection_head = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))
        self.criterion = EntropyReconstructionLoss(kappa=10.0)

    def forward(self, view0: Tensor, view1: Tensor) -> dict[str, Tensor]:
        z0, z1 = (
            nn.functional.normalize(self.projection_head(self.backbone(view).last_hidden_state[:, 0]), dim=1)
            for view in (view0, view1)
        )
        return {"loss": self.criterion(z0, z1)}


def collate(samples: list[tuple[Tensor, Tensor, int]]) -> dict[str, Tensor]:
    return {"view0": torch.stack([s[0] for s in samples]), "view1": torch.stack([s[1] for s in samples])}


def main(steps: int = 100) -> list[float]:
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=64,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(TwoViewModel(), arguments, train_dataset=TwoViews(), data_collator=collate)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print(main())
