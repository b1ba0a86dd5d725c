"""Small instances of every method, and noise as their views."""

import torch
from timm.models import VisionTransformer
from torch import nn

from fasttrain import methods
from fasttrain.methods import Step, Task
from fasttrain.pipelines import View, ViewRecipe

SMALL = {
    "barlow": {"hidden_dim": 16, "out_dim": 20},
    "byol": {"hidden_dim": 16, "out_dim": 8},
    "cmc": {"out_dim": 8, "negatives": 32},
    "deepcluster": {"nmb_prototypes": 8, "hidden_dim": 16, "out_dim": 8},
    "dino": {"out_dim": 32, "hidden_dim": 16, "bottleneck_dim": 8, "use_bn_in_head": True},
    "dinov2": {
        "head_n_prototypes": 32,
        "head_hidden_dim": 16,
        "head_bottleneck_dim": 8,
        "ibot_head_n_prototypes": 24,
        "ibot_head_hidden_dim": 16,
        "ibot_head_bottleneck_dim": 6,
    },
    "ibot": {"out_dim": 32, "hidden_dim": 16, "bottleneck_dim": 8},
    "infomin": {"queue_length": 64, "out_dim": 8},
    "lejepa": {"hidden_dim": 16, "out_dim": 8, "slices": 32},
    "moco": {"queue_length": 64, "out_dim": 8},
    "mocov3": {"hidden_dim": 16, "out_dim": 8},
    "simclr": {"hidden_dim": 16, "out_dim": 8},
    "simdino": {"hidden_dim": 16, "bottleneck_dim": 8, "use_bn_in_head": True},
    "simsiam": {"dim": 16, "pred_dim": 8},
    "swav": {"nmb_prototypes": 32, "hidden_dim": 16, "out_dim": 8},
    "vicreg": {"hidden_dim": 16, "out_dim": 20},
}
TWINS = [name for name in SMALL if methods.load(name).space is not None]
"""The methods with an entropy-reconstruction twin."""
CASES = [(name, entropy) for name in SMALL for entropy in (False, True) if not entropy or name in TWINS]
"""Every method, and every twin."""
IMAGES = 40


class PlainBackbone(nn.Module):
    num_features = 12

    def __init__(self, channels=3):
        super().__init__()
        self.linear = nn.Linear(channels, 12)
        self.calls = []

    def forward(self, x):
        self.calls.append(tuple(x.shape))
        return self.linear(x.mean((2, 3)))


class TinyViT(VisionTransformer):
    """Patches of 2 x 2 pixels, for methods that need them."""

    def __init__(self, channels=3, **options):
        options = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 1, "num_heads": 2, **options}
        super().__init__(in_chans=channels, num_classes=0, dynamic_img_size=True, **options)
        self.calls = []

    def forward(self, x):
        self.calls.append(tuple(x.shape))
        return super().forward(x)


def network_for(name):
    """Return the smallest network that the method works with."""
    return TinyViT if methods.load(name).needs_patches else PlainBackbone


def recipe(name="", globals_=2, **values):
    """Return two global views and three local ones, or what the method needs."""
    local = View(size=2, count=9, jigsaw=3, local=True) if name == "infomin" else View(size=4, count=3, local=True)
    values = {"color_space": "lab", **values} if name == "cmc" else values
    return ViewRecipe((View(size=8, count=globals_), local), **values)


def build(name, entropy, network=None, batch=16, views=None, **settings):
    """Build a small instance of a method; DeepCluster has seen its images."""
    torch.manual_seed(0)
    cls = methods.load(name)
    task = Task(entropy, recipe(name) if views is None else views, IMAGES, batch)
    method = cls(network or network_for(name), cls.Settings(**{**SMALL[name], **settings}), task)
    if method.needs_first_pass:
        for start in range(0, IMAGES, 20):
            method.first_pass(random_views(name, 20, seed=start), torch.arange(start, start + 20))
        method.start_epoch()
    return method


def random_views(name="", batch=16, seed=1):
    """Return noise in the shapes of :func:`recipe`."""
    generator = torch.Generator().manual_seed(seed)
    groups = recipe(name).groups
    return [torch.randn(count, batch, 3, size, size, generator=generator) for size, count in groups]


STEP = Step(index=0, total=100, per_epoch=10)
INDICES = torch.arange(16)


def run(method, name="", step=STEP, views=None):
    """Return the objective of one batch."""
    torch.manual_seed(5)
    return method(random_views(name) if views is None else views, step, INDICES)
