import dataclasses
import pickle

import pytest

from fasttrain.pipelines import Pixels, View, ViewRecipe, evaluation_view

GREY = Pixels(1, (0.1,), (0.3,), "linear")


def test_recipe_counts_its_views():
    recipe = ViewRecipe((View(224), View(224), View(96, 6, local=True)))
    assert (recipe.n_views, recipe.n_global, recipe.groups) == (8, 2, ((224, 2), (96, 6)))
    same = ViewRecipe((View(28, 2), View(28, 2, local=True)))
    assert (same.n_global, same.groups) == (2, ((28, 4),))


def test_recipe_takes_pixels_or_their_fields():
    views = (View(8),)
    recipe = ViewRecipe(views, 1, (0.1,), (0.3,), "linear")
    assert recipe == ViewRecipe(views, pixels=GREY) == pickle.loads(pickle.dumps(recipe))
    assert (recipe.channels, recipe.mean, recipe.std) == (1, (0.1,), (0.3,))
    assert (recipe.interpolation, recipe.color_space) == ("linear", "rgb")
    assert ViewRecipe(views).pixels == Pixels()
    replaced = dataclasses.replace(recipe, mean=(0.2,))
    assert (replaced.views, replaced.pixels) == (views, dataclasses.replace(GREY, mean=(0.2,)))
    assert evaluation_view(recipe, 8).pixels == GREY


BAD_VIEW = {
    **dict.fromkeys(("size", "count"), (0,)),
    **dict.fromkeys(("flip", "grey", "jitter_p", "blur", "solarize"), (-0.1, 1.5)),
    "scale": ((0.0, 1.0), (0.5, 0.4), (0.5, 1.1)),
    "ratio": ((0.0, 1.0),),
    "rotate": (-1.0,),
    "jitter": ((0.4, -0.4, 0.0, 0.0), (0.4, 0.4, 0.4, 0.6)),
    "blur_sigma": ((0.0, 2.0),),
    "rand_augment": (-1, 6),
    "rand_augment_magnitude": (10.5,),
    "jigsaw": (-1,),
}
BAD_RECIPE = {
    "views": ((), (View(8, local=True), View(8)), (View(8, local=True),)),
    "channels": (0, 17),
    "pixel_range": ((1.0,), (1.0, 1.0), (0.0, float("inf")), (0.0, 1.0, 0.0, 1.0)),
    "mean": ((0.5,),),
    "std": ((0.5, 0.0, 0.5),),
    "interpolation": ("area",),
    "color_space": ("hsv",),
}


@pytest.mark.parametrize(
    ("make", "change", "name"),
    [
        *((View, {name: value}, name) for name, values in BAD_VIEW.items() for value in values),
        (View, {"jigsaw": 3, "count": 8, "local": True}, "count"),
        (View, {"jigsaw": 2, "count": 4}, "local"),
        (View, {"jigsaw": 2, "count": 4, "local": True, "center": True}, "center"),
        *((ViewRecipe, {name: value}, name) for name, values in BAD_RECIPE.items() for value in values),
        (ViewRecipe, {"channels": 1}, "mean"),
        (ViewRecipe, {"pixels": GREY, "color_space": "lab"}, "color_space"),
    ],
)
def test_invalid_value_is_named(make, change, name):
    valid = {"size": 32} if make is View else {"views": (View(8),)}
    with pytest.raises(ValueError, match=f"^{name}: .*, got "):
        make(**{**valid, **change})
