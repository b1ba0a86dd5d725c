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


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"size": 0}, "size"),
        ({"count": 0}, "count"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.5, 0.4)}, "scale"),
        ({"scale": (0.5, 1.1)}, "scale"),
        ({"ratio": (0.0, 1.0)}, "ratio"),
        ({"rotate": -1.0}, "rotate"),
        ({"flip": 1.5}, "flip"),
        ({"grey": -0.1}, "grey"),
        ({"jitter_p": 2.0}, "jitter_p"),
        ({"blur": 2.0}, "blur"),
        ({"solarize": 2.0}, "solarize"),
        ({"jitter": (0.4, -0.4, 0.0, 0.0)}, "jitter"),
        ({"jitter": (0.4, 0.4, 0.4, 0.6)}, "jitter"),
        ({"blur_sigma": (0.0, 2.0)}, "blur_sigma"),
        ({"rand_augment": -1}, "rand_augment"),
        ({"rand_augment": 6}, "rand_augment"),
        ({"rand_augment_magnitude": 10.5}, "rand_augment_magnitude"),
        ({"jigsaw": -1}, "jigsaw"),
        ({"jigsaw": 3, "count": 8, "local": True}, "count"),
        ({"jigsaw": 2, "count": 4}, "local"),
        ({"jigsaw": 2, "count": 4, "local": True, "center": True}, "center"),
    ],
)
def test_view_with_invalid_value_names_it(change, name):
    with pytest.raises(ValueError, match=f"^{name}: .*, got "):
        View(**{"size": 32, **change})


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"views": ()}, "views"),
        ({"views": (View(8, local=True), View(8))}, "views"),
        ({"views": (View(8, local=True),)}, "views"),
        ({"channels": 2}, "channels"),
        ({"mean": (0.5,)}, "mean"),
        ({"channels": 1}, "mean"),
        ({"std": (0.5, 0.0, 0.5)}, "std"),
        ({"interpolation": "area"}, "interpolation"),
        ({"color_space": "hsv"}, "color_space"),
        ({"pixels": GREY, "color_space": "lab"}, "color_space"),
    ],
)
def test_recipe_with_invalid_value_names_it(change, name):
    with pytest.raises(ValueError, match=f"^{name}: .*, got "):
        ViewRecipe(**{"views": (View(8),), **change})
