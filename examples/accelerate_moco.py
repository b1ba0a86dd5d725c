"""MoCo with Hugging Face's Accelerate: an EMA of the network for the keys, and a queue that checkpoints hold."""

import copy

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import TwoViews, batches, network

from fasttrain.losses import NTXentLoss


def main(steps: int = 100) -> list[float]:
    set_seed(0)
    accelerator = Accelerator()
    student = network()
    teacher = copy.deepcopy(student).requires_grad_(False)
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(1024, 64))
    loader = torch.utils.data.DataLoader(TwoViews(), batch_size=64, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    student, teacher, criterion, optimizer, loader = accelerator.prepare(student, teacher, criterion, optimizer, loader)
    losses: list[float] = []
    for x0, x1, _ in batches(loader, steps):
        loss = criterion(student(x0), teacher(x1))
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        with torch.no_grad():
            for kept, new in zip(teacher.parameters(), student.parameters(), strict=True):
                kept.lerp_(new, 0.05)
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(main())
