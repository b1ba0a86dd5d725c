"""A configuration is fitted to the number of images, except for the settings that were given."""

import pytest
import yaml

from fasttrain.config.fit import fit_to_data
from fasttrain.config.resolve import resolve
from fasttrain.methods.registry import BUILT_IN


def _fit(images, method="dino", former=None, **values):
    return fit_to_data(resolve(method, {"data_path": "x", **values}), images, former)


@pytest.mark.parametrize("method", BUILT_IN)
def test_small_data_takes_photos_and_says_so(method):
    few, many = _fit(99_999, method), _fit(100_000, method)
    assert (few.config.recipe, many.config.recipe) == ("photos", "imagenet")
    assert few.reasons[0].startswith("recipe photos: ")
    assert many.reasons == ()
    assert many.config == resolve(method, {"data_path": "x"})


@pytest.mark.parametrize(("images", "epochs", "batch"), [(300, 1000, 8), (20_000, 250, 64), (80_000, 100, 64)])
def test_length_and_sizes_follow_from_the_images(images, epochs, batch):
    config = _fit(images).config
    assert (config.train.epochs, config.train.batch_size_per_gpu) == (epochs, batch)
    assert config.train.warmup_epochs == epochs / 10
    assert 256 <= config.settings.out_dim <= images / 8 or config.settings.out_dim == 256


def test_given_settings_and_recipes_are_not_changed():
    config = _fit(3000, epochs=7, out_dim=123).config
    assert (config.recipe, config.train.epochs, config.settings.out_dim) == ("photos", 7, 123)
    for recipe in ("imagenet", "cifar"):
        assert _fit(3000, recipe=recipe).config == resolve("dino", {"data_path": "x", "recipe": recipe})
    assert fit_to_data(resolve("dino", {}), 4000).config.recipe == "demo"


@pytest.mark.parametrize("former", [{"recipe": "imagenet"}, {"recipe": "photos", "epochs": 900, "out_dim": 512}])
def test_resumed_run_keeps_its_recipe_and_length(former):
    """Values of a run from before the recipe existed, and of a run whose data has grown."""
    config = _fit(3500, former=former).config
    flat = {"recipe": config.recipe, "epochs": config.train.epochs, "out_dim": config.settings.out_dim}
    assert former.items() <= flat.items()


def test_configuration_of_a_run_gives_the_same_run():
    config = _fit(3000).config
    again = fit_to_data(resolve("dino", {}, yaml.safe_load(config.to_yaml())), 5000)
    assert again.config == config
    assert again.reasons == ()


@pytest.mark.parametrize("images", [1, 2, 3, 5, 50])
def test_batch_is_never_larger_than_the_data(images):
    assert _fit(images).config.train.batch_size_per_gpu <= images
