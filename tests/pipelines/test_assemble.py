import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fasttrain.pipelines import View, ViewRecipe, dali, draw_parameters
from fasttrain.pipelines.assemble import make_views
from tests.pipelines.test_dali import S, make, neutral, pictures

JITTER = (0.4, 0.4, 0.2, 0.1)
RECIPE = ViewRecipe(
    (
        View(80, jitter=JITTER, grey=0.2, blur=0.5, solarize=0.2),
        View(S, 2, rotate=10, jitter=JITTER, blur=0.5),
        View(56, rand_augment=2, jitter=JITTER, grey=0.2, blur=0.5, local=True),
        View(24, 4, jigsaw=2, jitter=JITTER, local=True),
    )
)


def drawn(count, size=64):
    return draw_parameters(RECIPE, 0, 0, np.arange(count), np.full(count, size), np.full(count, size))


def test_threads_and_parts_change_nothing():
    images, parameters = pictures(13, 64), drawn(13)
    fed = dali.feed(RECIPE, images, parameters)
    outputs = dali.build(RECIPE, 13, lambda: fed, encoded=False, prefetch=1).run()
    alone = make_views(RECIPE, outputs, parameters, device="cpu")
    with ThreadPoolExecutor(3) as pool:
        shared = make_views(RECIPE, outputs, parameters, device="cpu", pool=pool, parts=3)
    assert [group.shape for group in alone] == [(v, 13, s, s, 3) for s, v in RECIPE.groups]
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    assert all(group.isfinite().all() for group in alone)


def test_an_error_in_a_thread_is_not_lost():
    images, parameters = pictures(2, 64), drawn(2)
    beyond = dataclasses.replace(parameters, end=parameters.start)  # an empty box
    fed = dali.feed(RECIPE, images, parameters)
    outputs = dali.build(RECIPE, 2, lambda: fed, encoded=False, prefetch=1).run()
    with ThreadPoolExecutor(2) as pool, pytest.raises(RuntimeError, match="size"):
        make_views(RECIPE, outputs, beyond, device="cpu", pool=pool, parts=2)


def test_colours_and_blur_are_the_same_inside_the_graph():
    """With RandAugment colours and blur are DALI's operators; where it draws nothing, the view is as without it."""
    view = View(S, flip=0, jitter=JITTER, grey=0.2, blur=0.5)
    images, parameters = pictures(12), neutral(pictures(12))
    law = draw_parameters(ViewRecipe((view,)), 3, 0, np.arange(12), np.full(12, S), np.full(12, S))
    parameters = dataclasses.replace(parameters, color=law.color, sigma=law.sigma)
    zero, unit = (0.0,) * 3, (1 / 255,) * 3
    plain = make(ViewRecipe((view,), mean=zero, std=unit), images, parameters)[0]
    augmented = dataclasses.replace(view, rand_augment=1)
    inside = make(ViewRecipe((augmented,), mean=zero, std=unit), images, parameters)[0]
    assert np.abs(plain - inside).mean() < 0.6
    assert np.abs(plain - inside).max() <= 4
