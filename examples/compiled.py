"""Compile network and loss together. The loss consists of torch operators, so the graph has no break."""

import torch
from digits import TwoViews, batches, network

from fasttrain.losses import NTXentLoss


def main(steps: int = 60) -> list[float]:
    torch.manual_seed(0)
    model, criterion = network(), NTXentLoss(temperature=0.2)

    @torch.compile(fullgraph=True)
    def loss_of(x0: torch.Tensor, x1: torch.Tensor) -> torch.Tensor:
        return criterion(model(x0), model(x1))

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(TwoViews(), batch_size=64, shuffle=True, drop_last=True)
    losses: list[float] = []
    for x0, x1, _ in batches(loader, steps):
        loss = loss_of(x0, x1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(main())
