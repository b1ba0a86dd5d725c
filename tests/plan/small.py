"""Small runs to plan, and the settings of ZeRO."""

import torch

from fasttrain.config.resolve import resolve
from fasttrain.engine.build import build_method
from fasttrain.plan.weights import Weight, Zero

_FEW = {
    "cmc": {"negatives": 64},
    "deepcluster": {"nmb_prototypes": 16, "out_dim": 16},
    "dino": {"out_dim": 64},
    "ibot": {"out_dim": 64, "patch_out_dim": 64},
    "infomin": {"queue_length": 64},
    "moco": {"queue_length": 64},
    "swav": {"nmb_prototypes": 16},
}
IMAGES = 640


def configured(name, **values):
    return resolve(name, {"recipe": "cifar", "batch_size_per_gpu": 8, **_FEW.get(name, {}), **values})


def built(config, world=1, device="meta"):
    torch.manual_seed(0)
    with torch.device(device):
        return build_method(config, images=IMAGES, world_size=world)


def weight(numel, group="decay", teacher=False, sent=4, name=None):
    return Weight(name or f"{group}.{numel}", numel, group, teacher, sent)


def zero(stage, world=4, **options):
    options = {"bucket": 1000, "persistent": 10, "reuse": 10**6, "prefetch": 100, "live": 0, **options}
    return Zero(stage, world, **{"overlap": False, "offload": False, **options})
