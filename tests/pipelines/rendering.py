"""Pictures, and the views that the graph and the photometric pass make of them."""

import dataclasses

import numpy as np
from PIL import Image

from fasttrain.pipelines import Parameters, View, ViewRecipe, dali
from fasttrain.pipelines.assemble import make_views
from fasttrain.pipelines.views.rand_augment import MOST

S = 48  # pixels of the test images and views
EVERYTHING = View(S, rotate=10, jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2, blur=0.5, solarize=0.2)


def pictures(count=3, size=S, channels=3):
    """Smooth random images, uint8 [size, size, C]: in noise every interpolation would differ."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 6, 6, channels), dtype=np.uint8)
    resized = [Image.fromarray(c.squeeze()).resize((size, size), Image.Resampling.BICUBIC) for c in coarse]
    return [np.array(r).reshape(size, size, channels) for r in resized]


def neutral(images, views=1):
    """Parameters that change nothing."""
    count, shape = len(images), (views, len(images))
    ends = np.array([image.shape[:2] for image in images], np.float32)
    return Parameters(
        start=np.zeros((*shape, 2), np.float32),
        end=np.broadcast_to(ends, (views, count, 2)).copy(),
        angle=np.zeros(shape, np.float32),
        flip=np.zeros(shape, bool),
        color=np.broadcast_to(np.array([1, 1, 1, 0], np.float32), (*shape, 4)).copy(),
        sigma=np.zeros(shape, np.float32),
        operation=np.zeros((*shape, MOST), np.int32),
        strength=np.zeros((*shape, MOST), np.float32),
        solarize=np.zeros(shape, bool),
    )


def run_graph(recipe, images, parameters):
    fed = dali.feed(recipe, images, parameters)
    return dali.build(recipe, len(images), lambda: fed, encoded=False, prefetch=1).run()


def make(recipe, images, parameters):
    """All views of decoded images, [B, size, size, C] each."""
    groups = make_views(recipe, run_graph(recipe, images, parameters), parameters, device="cpu")
    return [view.numpy() for group in groups for view in group]


def raw(*views, channels=3, interpolation="cubic"):
    """A recipe whose pixels are in 0..255."""
    return ViewRecipe(views, channels, (0.0,) * channels, (1 / 255,) * channels, interpolation)


def render(images, view=EVERYTHING, interpolation="cubic", **changes):
    """Pixels [B, size, size, C] in 0..255 of a view, with some of the neutral parameters changed."""
    parameters = neutral(images)
    changed = {
        name: np.broadcast_to(np.asarray(value, getattr(parameters, name).dtype), getattr(parameters, name).shape)
        for name, value in changes.items()
    }
    changed = dataclasses.replace(parameters, **{name: value.copy() for name, value in changed.items()})
    return make(raw(view, channels=images[0].shape[-1], interpolation=interpolation), images, changed)[0]
