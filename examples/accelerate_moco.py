"""Train MoCo with Hugging Face's Accelerate. Checkpoints include the loss, which holds the queue."""

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
            for target, source in zip(teacher.parameters(), student.parameters(), strict=True):
                target.lerp_(source, 0.05)
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(main())
