"""Small recipes, and what the loader's tests ask of batches."""

import torch

from fasttrain.pipelines import View, ViewRecipe

COLOR = ViewRecipe((View(16, 2, jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2), View(8, 3, scale=(0.1, 0.4), local=True)))
GREY = ViewRecipe((View(8, 2, rotate=10, jitter=(0.4, 0.4, 0, 0)),), 1, (0.1,), (0.3,))
RAW = ViewRecipe((View(16),), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def same(one, other):
    views = all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))
    return views and torch.equal(one.indices, other.indices)


def seen(batches):
    return torch.cat([batch.indices for batch in batches]).tolist()
