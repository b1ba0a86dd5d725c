"""Train with plain DeepSpeed at ZeRO 2. Every rank uses the keys of all ranks.

deepspeed --num_accelerators 2 examples/bare_deepspeed.py
"""

import argparse

import deepspeed
import torch
import torch.distributed as dist
from digits import TwoViews, batches, network
from torch.utils.data import DataLoader, DistributedSampler

from fasttrain.losses import InfoNCELoss


def main(steps: int = 100) -> list[float]:
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 32,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    model = network()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    criterion = InfoNCELoss(temperature=0.2, symmetric=True, gather_distributed=True)
    data = TwoViews()
    loader = DataLoader(data, batch_size=32, sampler=DistributedSampler(data), drop_last=True)
    losses: list[float] = []
    for x0, x1, _ in batches(loader, steps):
        loss = criterion(*engine(torch.cat([x0, x1]).to(engine.device)).chunk(2))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    if dist.get_rank() == 0:
        print(losses)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", help="set by the launcher")
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
