"""Train open_clip's CLIP on digits and their names. The loss of fasttrain stores no logits."""

import open_clip
import torch
from digits import TwoViews, batches

from fasttrain.losses.compat.open_clip import ClipLoss  # instead of: from open_clip.loss import ClipLoss

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def main(steps: int = 60) -> list[float]:
    torch.manual_seed(0)
    vision = {"image_size": 28, "layers": 2, "width": 64, "patch_size": 7, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    model = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)
    tokens = open_clip.SimpleTokenizer(context_length=8)([f"the digit {name}" for name in NAMES])
    criterion = ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(TwoViews(), batch_size=64, shuffle=True, drop_last=True)
    losses: list[float] = []
    for images, _, labels in batches(loader, steps):
        image_features, text_features, logit_scale = model(images.expand(-1, 3, -1, -1), tokens[labels])
        loss = criterion(image_features, text_features, logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(main())
