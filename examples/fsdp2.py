"""Train with PyTorch's FSDP2. The negatives are from all ranks.

torchrun --nproc_per_node 2 examples/fsdp2.py
"""

import argparse
import os

import torch
import torch.distributed as dist
from digits import TwoViews, batches, network
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from fasttrain.losses import NTXentLoss


def main(steps: int = 100) -> list[float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
    torch.manual_seed(0)
    model = network().to(device)
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    criterion = NTXentLoss(temperature=0.2, gather_distributed=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = TwoViews()
    loader = DataLoader(data, batch_size=32, sampler=DistributedSampler(data), drop_last=True)
    losses: list[float] = []
    for x0, x1, _ in batches(loader, steps):
        loss = criterion(*model(torch.cat([x0, x1]).to(device)).chunk(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if dist.get_rank() == 0:
        print(losses)
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
