"""Distributions of the parameters, of a view with everything and of every published recipe.

Seeds are fixed, so a test always passes or always fails. ALPHA allows for the several hundred tests.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from fasttrain.pipelines import View, ViewRecipe, draw_parameters, evaluation_view
from fasttrain.pipelines.views.draw import epoch_order, uniforms
from fasttrain.pipelines.views.rand_augment import OPERATIONS

N, ALPHA = 4000, 1e-5
RECIPES = Path(__file__).parents[3] / "fasttrain/config/recipes"
BOX = {"scale": (0.2, 0.3), "ratio": (0.5, 2.0), "rotate": 30, "flip": 0.3}
COLOUR = {"jitter": (0.4, 0.3, 1.2, 0.1), "jitter_p": 0.7, "grey": 0.2, "blur": 0.6, "solarize": 0.25}
FULL = View(32, rand_augment=3, **BOX, **COLOUR)
JIGSAW = View(64, 9, scale=(0.6, 1.0), local=True, jigsaw=3, jitter=(0.4, 0.4, 0.4, 0.1))


def drawn(recipe, count=N, seed=0, epoch=0, height=375, width=500):
    return draw_parameters(recipe, seed, epoch, np.arange(count), np.full(count, height), np.full(count, width))


def assert_uniform(values, low, high):
    if high - low < 1e-9:
        np.testing.assert_allclose(values, low, atol=1e-6)
    else:
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > ALPHA


def assert_probability(hits, p):
    assert stats.binomtest(int(hits.sum()), hits.size, p).pvalue > ALPHA


def assert_independent(*columns, dependent=()):
    """Check rank correlations. ``dependent`` are pairs of columns that may be correlated."""
    correlation = stats.spearmanr(np.stack(columns, 1).astype(float)).statistic - np.eye(len(columns))
    for a, b in dependent:
        correlation[a, b] = correlation[b, a] = 0
    assert np.abs(correlation).max() < 4.5 / np.sqrt(len(columns[0]))


def published():
    """Every distinct view of the recipes, named after the first recipe that has it."""
    views = {FULL: "full"}
    for path in sorted(RECIPES.glob("*/*.yaml")):
        for view in yaml.safe_load(path.read_text()).get("views", []):
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in view.items()}
            if not values.get("jigsaw"):
                values.pop("count", None)
            view = View(**{**values, "local": bool(values.get("jigsaw"))})
            views.setdefault(view, f"{path.parent.name}-{path.stem}-{view.size}")
    assert len(views) > 5
    return [pytest.param(view, id=name) for view, name in views.items()]


@pytest.mark.parametrize("view", published())
def test_parameters_follow_the_view(view):
    recipe = ViewRecipe((View(32), view)) if view.local else ViewRecipe((view,))
    p = drawn(recipe, seed=11, epoch=5)
    p = {name: getattr(p, name)[int(view.local)].astype(float) for name in p.__dataclass_fields__}
    assert_probability(p["flip"], view.flip)
    assert_probability(p["solarize"], view.solarize)
    assert_uniform(p["angle"], -view.rotate, view.rotate)
    assert_probability(p["sigma"] > 0, view.blur)
    if view.blur:
        assert_uniform(p["sigma"][p["sigma"] > 0], *view.blur_sigma)
    assert not p["operation"][:, view.rand_augment :].any()
    for column in p["operation"][:, : view.rand_augment].T.astype(int):
        counts = np.bincount(column, minlength=1 + len(OPERATIONS))
        assert stats.chisquare(counts, N * np.array([0.5, *[0.5 / len(OPERATIONS)] * len(OPERATIONS)])).pvalue > ALPHA
    brightness, contrast, saturation, hue = p["color"].T
    low, high = np.maximum(0, 1 - np.array(view.jitter)), 1 + np.array(view.jitter)
    changed = np.stack([brightness, contrast]) != 1
    jittered = changed.any(0)
    if any(view.jitter[:2]):  # a factor is 1 by chance with probability 0
        assert_probability(jittered, view.jitter_p)
        assert_uniform(brightness[jittered], low[0], high[0])
        assert_uniform(contrast[jittered], low[1], high[1])
        assert_uniform(hue[jittered], -view.jitter[3], view.jitter[3])
        assert_uniform(saturation[jittered & (saturation > 0)], low[2], high[2])
        assert set(saturation[~jittered]) <= {0, 1}
    assert (hue[~jittered] == 0).all()
    assert_probability(saturation == 0, view.grey)


@pytest.mark.parametrize(
    ("view", "height", "width"),
    [
        *(pytest.param(*view.values, 375, 500, id=view.id) for view in published() if not view.values[0].jigsaw),
        *((View(32), height, width) for height, width in ((32, 32), (60, 300), (9, 3))),
    ],
)
def test_crop_follows_torchvision(view, height, width):
    p = drawn(ViewRecipe((dataclasses.replace(view, local=False),)), height=height, width=width)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    boxes = [RandomResizedCrop.get_params(image, list(view.scale), list(view.ratio)) for _ in range(N)]
    box = np.concatenate([p.start[0], (p.end - p.start)[0]], 1).astype(float)
    (top, left, h, w), (y, x, other_h, other_w) = box.T, np.array(boxes, float).T
    for values, others in ((top, y), (left, x), (h * w, other_h * other_w), (w / h, other_w / other_h)):
        assert stats.ks_2samp(values, others).pvalue > ALPHA
    assert (p.start >= 0).all()
    assert (p.end[0] <= [height, width]).all()
    assert (box[:, 2:] >= 1).all()


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (1, 1), (2, 7)])
def test_crop_falls_back_to_torchvisions_centre(height, width):
    scale, ratio = (1.0, 1.0), (0.9, 1.1)
    expected = RandomResizedCrop.get_params(torch.empty(3, height, width), scale, ratio)
    p = drawn(ViewRecipe((View(32, scale=scale, ratio=ratio),)), 50, height=height, width=width)
    assert (np.concatenate([p.start[0], (p.end - p.start)[0]], 1) == np.array(expected)).all()


def test_parameters_are_independent_of_each_other():
    view = dataclasses.replace(FULL, rand_augment_magnitude=5, jitter_p=1, grey=0)
    p = drawn(ViewRecipe((view, view)), height=4000, width=4000)
    size = p.end - p.start
    columns = [*p.start[0].T, *size[0].T, p.angle[0], p.flip[0], *p.color[0].T, p.sigma[0], p.solarize[0]]
    columns += [*p.operation[0, :, :3].T, *p.operation[1, :, :3].T, p.color[1, :, 0]]
    # A wide box cannot be high, or lie far to the right.
    assert_independent(*columns, dependent=[(a, b) for a in range(4) for b in range(a)])


def test_uniforms_are_uniform_and_independent():
    u = uniforms(7, 3, np.arange(N), 8)
    for column in u.T:
        assert_uniform(column, 0, 1)
    others = [uniforms(7, 4, np.arange(N), 8), uniforms(8, 3, np.arange(N), 8)]
    assert_independent(*u.T, *(column for other in others for column in other.T))
    assert_independent(u[:-1, 0], u[1:, 0], u[1:, 1])


def test_uniforms_never_change():
    """Published runs depend on the hash, so it must be the same in every version and on every platform."""
    assert uniforms(5, 2, [9], 2).tolist() == [[0.6125065188688521, 0.17493248023493058]]


def test_order_is_a_fair_permutation():
    orders = np.stack([epoch_order(0, epoch, 10) for epoch in range(2000)])
    assert (np.sort(orders, 1) == np.arange(10)).all()
    counts = np.stack([np.bincount(column, minlength=10) for column in orders.T])
    assert np.abs(counts - 200).max() < 5 * np.sqrt(200 * 0.9)
    places = np.argsort(epoch_order(0, 0, N))
    correlation = [stats.spearmanr(places, column).statistic for column in uniforms(0, 0, np.arange(N), 64).T]
    assert np.abs(correlation).max() < 4.5 / np.sqrt(N)  # with the parameters of the views


def test_parameters_depend_on_seed_epoch_index_and_view():
    recipe = ViewRecipe((View(32, 2, rand_augment=2), JIGSAW))
    indices, size = np.array([5, 900, 17, 5]), np.full(4, 64)
    p = draw_parameters(recipe, 1, 2, indices, size, size)
    alone = draw_parameters(recipe, 1, 2, indices[1:2], size[:1], size[:1])
    for name in p.__dataclass_fields__:
        values = getattr(p, name)
        assert (values[:, 1] == getattr(alone, name)[:, 0]).all()
        assert (values[:, 0] == values[:, 3]).all()
    assert (p.start[0] != p.start[1]).any()
    for seed, epoch in ((2, 2), (1, 3), (-1, 2), (2**70, 2)):
        assert (draw_parameters(recipe, seed, epoch, indices, size, size).start != p.start).any()


def test_more_views_or_operations_change_no_other_parameter():
    few, many, plain = (
        drawn(ViewRecipe((View(32, n, jitter=(0.4,) * 4, rand_augment=k),)), 8) for n, k in ((2, 5), (3, 5), (2, 0))
    )
    for name in ("start", "end", "color", "sigma", "flip", "solarize"):
        assert (getattr(few, name) == getattr(many, name)[:2]).all()
        assert (getattr(few, name) == getattr(plain, name)).all()


def test_jigsaw_patches_lie_in_cells_of_one_flipped_crop():
    heights, widths = np.random.default_rng(0).integers(80, 400, (2, N))
    crop = dataclasses.replace(JIGSAW, count=1, jigsaw=0)  # copy 0 without the jigsaw
    p, whole = (
        draw_parameters(ViewRecipe((View(224), view)), 0, 0, np.arange(N), heights, widths) for view in (JIGSAW, crop)
    )
    start, end, flip = whole.start[1].astype(float), whole.end[1].astype(float), whole.flip[1]
    assert (p.flip[1:] == flip).all()
    cell, offsets = (end - start) / 3, []
    for i in range(9):
        patch_start, patch_end = p.start[1 + i].astype(float), p.end[1 + i].astype(float)
        np.testing.assert_allclose(patch_end - patch_start, cell * 64 / 85, atol=1e-3)
        row, column = divmod(i, 3)
        corner = start + cell * np.stack([np.full(N, row), np.where(flip, 2 - column, column)], -1)
        offsets += list(((patch_start - corner) / (cell * 21 / 85)).T)
    for offset in offsets:
        assert -1e-4 <= offset.min() <= offset.max() <= 1 + 1e-4
        assert_uniform(offset, -1e-4, 1 + 1e-4)
    assert_independent(*offsets)
    brightness = p.color[1:, :, 0]  # each patch has its own colours
    assert_probability((brightness[0] != 1) & (brightness[1] != 1), 0.8**2)
    assert (brightness[0] != brightness[1]).mean() > 0.9


@pytest.mark.parametrize(
    ("size", "height", "width", "start", "end"),
    [(32, 32, 32, [0, 0], [32, 32]), (32, 20, 51, [0, 15], [20, 35]), (224, 256, 300, [16, 38], [240, 262])],
)
def test_evaluation_takes_the_central_square(size, height, width, start, end):
    recipe = evaluation_view(ViewRecipe((View(224, 2, jitter=(1, 1, 1, 0.5), blur=1),)), size)
    assert recipe.groups == ((size, 1),)
    p = draw_parameters(recipe, 3, 4, [0], [height], [width])
    assert (p.start.tolist(), p.end.tolist(), p.color.tolist()) == ([[start]], [[end]], [[[1, 1, 1, 0]]])
    assert (p.flip.any(), p.sigma.any()) == (False, False)


@pytest.mark.parametrize(
    ("size", "height", "width", "start", "end"),
    [
        ((32, 16), 20, 50, [0, 20], [20, 30]),
        ((32, 16), 100, 20, [30, 0], [70, 20]),
        ((16, 32), 30, 60, [0, 0], [30, 60]),
        ((224, 112), 256, 128, [16, 8], [240, 120]),
    ],
)
def test_evaluation_takes_the_central_box_of_its_shape(size, height, width, start, end):
    recipe = evaluation_view(ViewRecipe((View(224),)), size)
    p = draw_parameters(recipe, 3, 4, [0], [height], [width])
    assert (p.start.tolist(), p.end.tolist()) == ([[start]], [[end]])


@pytest.mark.parametrize("size", [(224, 112), (60, 240)])
def test_crops_keep_the_shape_of_their_view(size):
    """A crop of another shape would squeeze the picture by more than ``ratio``."""
    height, width = np.full(N, 500), np.full(N, 500)
    p = draw_parameters(ViewRecipe((View(size, scale=(0.02, 0.1)),)), 0, 0, np.arange(N), height, width)
    h, w = (p.end - p.start)[0].astype(float).T
    ratio = w / h * size[0] / size[1]
    assert 0.7 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.43
