"""Small recipes, and comparisons of batches."""

import torch

from fasttrain.pipelines import View, ViewRecipe

COLOR = ViewRecipe((View(16, 2, jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2), View(8, 3, scale=(0.1, 0.4), local=True)))
GREY = ViewRecipe((View(8, 2, rotate=10, jitter=(0.4, 0.4, 0, 0)),), 1, (0.1,), (0.3,))
RAW = ViewRecipe((View(16),), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def join(parts):
    """Concatenate the batches of all ranks: views, labels, indices."""
    views = [torch.cat(groups, 1) for groups in zip(*(part.views for part in parts), strict=True)]
    return [*views, *(torch.cat([getattr(part, name) for part in parts]) for name in ("labels", "indices"))]


def assert_same(batches, expected):
    """Check that two runs, each a list of lists of ranks' batches, are equal bit for bit."""
    assert len(batches) == len(expected) > 0
    for parts, others in zip(batches, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(join(parts), join(others), strict=True))


def seen(batches):
    return torch.cat([batch.indices for batch in batches]).tolist()
