"""What is drawn for the published recipes' views follows the recipes: every parameter of every view.

Seeds are fixed, so a test passes or fails for good; ALPHA leaves room for the several hundred of them.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from fasttrain.pipelines import View, ViewRecipe, draw_parameters
from fasttrain.pipelines.views.rand_augment import OPERATIONS

N, ALPHA = 3000, 1e-5
HEIGHT, WIDTH = 375, 500


def published():
    """Every distinct view of the recipes, with the first recipe that has it."""
    found = {}
    for path in sorted((Path(__file__).parents[3] / "fasttrain/config/recipes").glob("*/*.yaml")):
        for view in yaml.safe_load(path.read_text()).get("views", []):
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in view.items()}
            if not values.get("jigsaw"):
                values.pop("count", None)
            found.setdefault(View(**{**values, "local": bool(values.get("jigsaw"))}), f"{path.parent.name}-{path.stem}")
    return [pytest.param(view, id=f"{name}-{view.size}") for view, name in found.items()]


views = pytest.mark.parametrize("view", published())


def drawn(view):
    """Parameters of the view's first copy."""
    recipe = ViewRecipe((View(32), view)) if view.local else ViewRecipe((view,))
    p = draw_parameters(recipe, 11, 5, np.arange(N), np.full(N, HEIGHT), np.full(N, WIDTH))
    return {name: getattr(p, name)[int(view.local)].astype(float) for name in p.__dataclass_fields__}


def assert_uniform(values, low, high):
    """Kolmogorov and Smirnov's test; a span of nothing is a constant."""
    if high - low < 1e-9:
        np.testing.assert_allclose(values, low, atol=1e-6)
    else:
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > ALPHA


def assert_often(hits, p):
    assert stats.binomtest(int(hits.sum()), hits.size, p).pvalue > ALPHA


@views
def test_crop(view):
    if view.jigsaw:
        pytest.skip("a patch of the crop; test_views.py has its law")
    p = drawn(view)
    height, width = (p["end"] - p["start"]).T
    torch.manual_seed(0)
    image = torch.empty(3, HEIGHT, WIDTH)
    boxes = [RandomResizedCrop.get_params(image, list(view.scale), list(view.ratio)) for _ in range(N)]
    top, left, theirs_height, theirs_width = np.array(boxes, float).T
    for mine, other in (
        (height * width, theirs_height * theirs_width),
        (width / height, theirs_width / theirs_height),
        (p["start"][:, 0], top),
        (p["start"][:, 1], left),
    ):
        assert stats.ks_2samp(mine, other).pvalue > ALPHA


@views
def test_flip_and_solarisation(view):
    p = drawn(view)
    assert_often(p["flip"], view.flip)
    assert_often(p["solarize"], view.solarize)


@views
def test_jitter_and_grey(view):
    brightness, contrast, saturation, hue = drawn(view)["color"].T
    strengths = view.jitter
    if any(strengths[:3]):
        which = next(k for k in range(3) if strengths[k])  # a factor is 1 by chance with probability 0
        jittered = (brightness, contrast, saturation)[which] != 1
        assert_often(jittered, view.jitter_p)
    else:
        jittered = np.zeros(N, bool)
    for factor, strength in ((brightness, strengths[0]), (contrast, strengths[1])):
        assert_uniform(factor[jittered], max(0, 1 - strength), 1 + strength) if jittered.any() else None
    colored = saturation > 0
    assert_often(~colored, view.grey)
    if (jittered & colored).any():
        assert_uniform(saturation[jittered & colored], max(0, 1 - strengths[2]), 1 + strengths[2])
        assert_uniform(hue[jittered], -strengths[3], strengths[3])
    assert (np.stack([brightness, contrast])[:, ~jittered] == 1).all()
    assert (hue[~jittered] == 0).all()


@views
def test_blur_and_turn(view):
    p = drawn(view)
    blurred = p["sigma"] > 0
    assert_often(blurred, view.blur)
    if view.blur:
        assert_uniform(p["sigma"][blurred], *view.blur_sigma)
    assert_uniform(p["angle"], -view.rotate, view.rotate)


@views
def test_operations_of_rand_augment(view):
    operation = drawn(view)["operation"].astype(int)
    assert not operation[:, view.rand_augment :].any()
    for column in operation[:, : view.rand_augment].T:
        counts = np.bincount(column, minlength=1 + len(OPERATIONS))
        expected = N * np.array([0.5, *[0.5 / len(OPERATIONS)] * len(OPERATIONS)])
        assert stats.chisquare(counts, expected).pvalue > ALPHA
