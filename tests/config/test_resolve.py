"""The configuration: precedence, reading back, view flags, and one line for everything invalid."""

import dataclasses
import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain import methods
from fasttrain.config.arguments import parse
from fasttrain.config.recipes import entries, recipe_layers, recipe_names
from fasttrain.config.resolve import read_yaml, resolve
from fasttrain.config.settings import TrainConfig, ViewFlags
from fasttrain.errors import ConfigError
from fasttrain.methods.registry import BUILT_IN

_PAIRS = [(method, recipe) for method in BUILT_IN for recipe in recipe_names(method)]


def _parse(*arguments):
    return parse([str(a) for a in arguments])[0]


def _file(folder, text):
    path = folder / "settings.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(("method", "recipe"), _PAIRS)
def test_every_recipe_reads_back_to_the_same_configuration(tmp_path, method, recipe, entropy):
    if entropy and methods.load(method).space is None:
        with pytest.raises(ConfigError, match="^--entropy: .*no entropy-reconstruction twin"):
            resolve(method, {"recipe": recipe, "entropy": entropy})
        return
    config = resolve(method, {"recipe": recipe, "entropy": entropy, "data_path": "images"})
    assert (config.method, config.recipe, config.entropy) == (method, recipe, entropy)
    assert _parse("--config", _file(tmp_path, config.to_yaml())) == config


_VALUES = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.floats(0, 1e6),
        "epochs": st.integers(1, 10**9),
        "zero_stage": st.sampled_from([None, 0, 1, 2, 3]),
        "global_crops_size": st.integers(1, 512),
        "global_crops_scale": st.tuples(st.floats(0.01, 0.5), st.floats(0.5, 1)),
        "local_crops_number": st.integers(0, 20),
        "output_dir": st.text(min_size=1),
        "deterministic": st.booleans(),
        "teacher_temp": st.floats(0.01, 1),
        "seed": st.integers(0, 2**63 - 1),
    },
)


@settings(deadline=None, max_examples=50)
@given(_VALUES)
def test_any_values_read_back(values):
    config = resolve("dino", {"recipe": "imagenet", **values})
    assert resolve("dino", {}, yaml.safe_load(config.to_yaml())) == config


def test_precedence_is_method_recipe_file_flag(tmp_path):
    assert TrainConfig().lr == 5e-4
    paper, recipe = (layer["lr"] for layer in recipe_layers("cifar", "simclr", False))
    assert _parse("--method", "simclr", "--recipe", "imagenet").train.lr == paper == 0.3
    assert _parse("--method", "simclr", "--recipe", "cifar").train.lr == recipe not in (5e-4, 0.3)
    file = _file(tmp_path, "method: simclr\nrecipe: cifar\nlr: 0.5\ntemperature: 0.25\nlog_every: 3\n")
    assert _parse("--config", file).train.lr == 0.5
    config = _parse("--config", file, "--lr", "0.75", "--method", "simclr")
    assert (config.train.lr, config.train.log_every, config.settings.temperature) == (0.75, 3, 0.25)
    assert config.recipe == "cifar"
    assert _parse("--config", file, "--recipe", "demo").views.channels == 1


def test_default_recipe_is_demo_without_data_and_imagenet_with(tmp_path):
    assert _parse("--method", "dino").recipe == "demo"
    assert _parse("--config", _file(tmp_path, "method: dino\ndata_path: x\n")).recipe == "imagenet"
    paper = _parse("--method", "dino", "--data_path", "x")
    assert (paper.views.n_global, paper.views.groups) == (2, ((224, 2), (96, 8)))
    assert dataclasses.replace(paper.train, data_path=None) == TrainConfig(clip_each=True)


def test_with_entropy_overrides_the_recipe_for_the_twin():
    *base, twin = recipe_layers("demo", "dino", True)
    assert base == recipe_layers("demo", "dino", False)
    assert twin == {"no_centering": True, "epochs": 25, "knn_every": 10}
    assert not any("with_entropy" in layer for layer in base)
    assert resolve("dino", {"entropy": True}).settings.no_centering
    assert not resolve("dino", {"entropy": True, "no_centering": False}).settings.no_centering


def test_view_flags_change_the_views_of_their_kind_only():
    flags = {"global_crops_size": 20, "global_crops_scale": (0.5, 1.0), "local_crops_size": 12}
    flags |= {"local_crops_scale": (0.1, 0.5), "local_crops_number": 5, "recipe": "imagenet"}
    assert set(flags) - {"recipe"} == {field.name for field in dataclasses.fields(ViewFlags)}
    views, plain = resolve("dino", flags).views, resolve("dino", {"recipe": "imagenet"}).views
    assert [(v.size, v.scale, v.count) for v in views.views] == [(20, (0.5, 1.0), 1)] * 2 + [(12, (0.1, 0.5), 5)]
    same = {"size": 1, "scale": (0.5, 0.5), "count": 1}
    changed, unchanged = ([dataclasses.replace(v, **same) for v in recipe.views] for recipe in (views, plain))
    assert changed == unchanged
    none = resolve("dino", {"local_crops_number": 0, "recipe": "imagenet"}).views
    assert none.n_views == none.n_global == 2


def test_two_numbers_are_height_and_width(tmp_path):
    flags = ("--global_crops_size", 224, 112, "--local_crops_size", 96, 96)
    config = _parse("--method", "dino", "--recipe", "imagenet", *flags)
    assert [view.size for view in config.views.views] == [(224, 112), (224, 112), 96]
    again = _parse("--config", _file(tmp_path, config.to_yaml()))
    assert again == config


def test_stated_channels_leave_mean_and_std_to_the_images():
    config = _parse("--method", "dino", "--channels", 13)
    assert (config.views.channels, len(config.views.mean), config.request.pixels) == (13, 13, {"channels"})
    assert _parse("--method", "dino", "--pixel_range", *[0, 9] * 13).views.channels == 13


def test_yaml_numbers_without_a_point_are_numbers(tmp_path):
    config = _parse("--config", _file(tmp_path, "method: dino\nlr: 2e-3\nwarmup_epochs: 3\n"))  # YAML 1.1: text
    assert (config.train.lr, config.train.warmup_epochs) == (0.002, 3.0)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("lr: [1, 2\nepochs: }", "settings.yaml"),
        ("\tlr: 1", "settings.yaml"),
        ("", "settings.yaml"),
        ("- lr\n- epochs", "settings.yaml"),
        ("method: dino", "--method.*'dino'.*'simclr'"),
        ("method: [dino]", "--method.*dino.*'simclr'"),
        ("temprature: 1", "'temprature'.*temperature"),
        ("teacher_temp: 1", "'teacher_temp'"),  # another method's
        ("1: 2", "setting 1 "),
        ("lr: fast", "--lr: .*'fast'"),
        ("lr: .nan", "--lr: .*finite.*nan"),
        ("lr:", "--lr: .*None"),
        ("epochs: 1.5", "--epochs: .*1.5"),
        ("entropy: maybe", "--entropy: .*'maybe'"),
        ("recipe: [demo]", "--recipe: .*demo"),
        ("zero_stage: 4", "--zero_stage: .*4"),
        ("{zero_stage: 0, overlap_comm: true}", "--overlap_comm: .*--zero_stage"),
        ("{zero_stage: 0, offload_optimizer: true}", "--offload_optimizer: .*--zero_stage"),
        ("views: [{size: 28, cuont: 2}]", "'cuont'.*count"),
        ("views: [{size: 28, 3: 2}]", "views: setting 3 "),
        ("views: [{count: 2}]", "--views.0.size: "),
        ("views: 3", "--views: .*3"),
        ("views: [3]", "--views.0: .*3"),
        ("views: [{size: 28, flip: 2}]", "--views.0: .*flip.*2.0"),
        ("views: [{size: 28, local: true}]", "views.*local"),
        ("channels: 17", "^--channels: .*17"),
        ("global_crops_size: [8, 8, 8]", "--global_crops_size: "),
        ("pixel_range: [1, 0]", "^--pixel_range: .*1"),
        ("mean: [0.5]\nchannels: 3", "mean.*3.*1"),
    ],
)
def test_invalid_file_is_one_line_that_names_the_setting(tmp_path, content, names):
    with pytest.raises(ConfigError, match=names) as refusal:
        _parse("--method", "simclr", "--config", _file(tmp_path, content))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [bytes(range(256)), b"lr: \xff\xfe", b"\x00\x01", None])
def test_binary_file_or_folder_is_no_configuration(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        _parse("--config", path)


_AT_LEAST_1 = ("epochs", "batch_size_per_gpu", "log_every", "limit_steps", "saveckp_freq", "global_crops_size")
_AT_LEAST_0 = ("seed", "num_workers", "knn_every", "saveckp_freq_steps", "local_crops_number")


@pytest.mark.parametrize(
    ("method", "values", "names"),
    [
        *(("dino", {name: 0}, f"--{name}: .*1, got 0") for name in _AT_LEAST_1),
        *(("dino", {name: -1}, f"--{name}: .*0, got -1") for name in _AT_LEAST_0),
        *(("dino", {name: math.inf}, f"--{name}: .*inf") for name in ("lr", "weight_decay", "clip_grad")),
        ("dino", {"seed": 2**63}, "--seed: "),
        ("dino", {"max_bad_fraction": 1.5}, "--max_bad_fraction: .*1.5"),
        ("dino", {"max_bad_fraction": math.nan}, "--max_bad_fraction: .*nan"),
        ("dino", {"warmup_epochs": -0.5}, "--warmup_epochs: .*-0.5"),
        ("dino", {"optimizer": "adamv"}, "'adamv'.*adamw"),
        ("dino", {"local_crops_number": 2}, "--local_crops_number: "),
        ("dino", {"global_crops_scale": (0.0, 1.0)}, "scale"),
        ("dino", {"global_crops_scale": (0.5, 0.4)}, "scale"),
        ("dino", {"momentum_teacher": 1.5}, "--momentum_teacher: .*1.5"),
        ("byol", {"momentum_teacher": -0.5}, "--momentum_teacher: .*-0.5"),
        ("dino", {"teacher_temp": 0}, "--teacher_temp: .*above 0"),
        ("dino", {"out_dim": 1}, "--out_dim: .*2, got 1"),
        ("infomin", {"beta": 2}, "--beta: .*2"),
        ("byol", {"kappa": math.nan}, "--kappa: .*nan"),
        *((method, {"temperature": 0}, "--temperature: .*above 0") for method in ("simclr", "mocov3", "cmc")),
        ("swav", {"epsilon": -0.05}, "--epsilon: .*-0.05"),
        ("moco", {"bn_splits": 0}, "--bn_splits: .*0"),
        ("simclr", {"num_heads": 0}, "--num_heads: .*0"),
        ("simclr", {"drop_path_rate": 1.5}, "--drop_path_rate: .*1.5"),
    ],
)
def test_value_out_of_range_is_refused_by_flag(method, values, names):
    with pytest.raises(ConfigError, match=names):
        resolve(method, values)


@pytest.mark.parametrize("cls", [TrainConfig, *(methods.load(name).Settings for name in BUILT_IN)])
def test_every_number_has_a_range(cls):
    hints = {field.name: str(field.type) for field in dataclasses.fields(cls)}
    assert {name for name, hint in hints.items() if hint.split(" | ")[0] in ("int", "float")} == set()


def test_absolute_paths_are_valid_in_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    config = resolve("dino", {"data_path": "shards/{000..146}.tar", "val_path": "~/val"})
    absolute = config.with_absolute_paths()
    assert (absolute.train.data_path, absolute.train.val_path) == (
        f"{tmp_path}/shards/{{000..146}}.tar",
        "/home/me/val",
    )
    assert absolute.with_absolute_paths() == absolute
    for path in (None, "in memory: array"):
        values = {} if path is None else {"data_path": path}
        assert resolve("dino", values).with_absolute_paths().train.data_path == path


def test_recipes_are_known_by_their_files():
    assert recipe_names("no_such_method") == []
    assert {"cifar", "demo", "imagenet"} <= set.intersection(*(set(recipe_names(name)) for name in BUILT_IN))
    assert {"imagenet-vit_base_16", "imagenet-vit_base_8"} <= set(recipe_names("dino"))
    with pytest.raises(ValueError, match="--recipe: 'cifar'.*no_such_method"):
        recipe_layers("cifar", "no_such_method", False)
    assert recipe_layers("cifar", "no_such_method", False, like="simclr") == recipe_layers("cifar", "simclr", False)


def test_every_recipe_states_its_source_and_published_result():
    rows = entries()
    assert {(row.method, row.recipe) for row in rows} == set(_PAIRS)
    for row in rows:
        assert row.source
        assert row.published
        assert row.epochs == resolve(row.method, {"recipe": row.recipe, "data_path": "x"}).train.epochs


def test_home_folder_is_expanded_in_every_path(monkeypatch, tmp_path):
    """``--output_dir=~/x`` trained into ``./~/x``; ``fasttrain.train`` lost the result of the whole training."""
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("output_dir", "data_path", "val_path", "init_from", "resume")
    train = resolve("dino", dict.fromkeys(names, "~/x")).train
    assert {getattr(train, name) for name in names} == {str(tmp_path / "x")}
    assert resolve("dino", {"output_dir": "~nobody-has-this-name/x"}).train.output_dir == "~nobody-has-this-name/x"


@pytest.mark.parametrize(
    ("name", "ours"),
    [("batch_size", "batch_size_per_gpu"), ("max_epochs", "epochs"), ("optim.base_lr", "lr"), ("model", "arch")],
)
def test_names_of_other_trainers_suggest_the_setting_here(name, ours):
    """--batch_size suggested --patch_size."""
    with pytest.raises(ConfigError, match=f"did you mean {ours}"):
        resolve("dino", {name: 1})


@pytest.mark.parametrize("name", ["data_path", "output_dir", "init_from", "resume"])
def test_empty_path_is_refused(name):
    """It is an unset variable of the shell, and the current folder was taken instead."""
    with pytest.raises(ConfigError, match=f"--{name}: must not be empty"):
        resolve("dino", {name: ""})


def test_empty_list_of_paths_is_refused():
    with pytest.raises(ConfigError, match="--data_path: must not be empty"):
        resolve("dino", {"data_path": []})


@pytest.mark.parametrize(("method", "name"), [("simclr", "out_dim"), ("simsiam", "dim"), ("dino", "bottleneck_dim")])
def test_projection_of_one_dimension_is_refused(method, name):
    with pytest.raises(ConfigError, match=f"--{name}: must be at least 2"):
        resolve(method, {name: 1})


def test_truth_values_are_no_numbers(tmp_path):
    with pytest.raises(ConfigError, match="--epochs: must be a number, got True"):
        resolve("dino", {"epochs": True})
    assert resolve("dino", {"overlap_comm": True}).train.overlap_comm


def test_setting_that_is_written_twice_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_text("lr: 0.1\nviews: [{size: 3}]\nlr: 0.2\n")
    with pytest.raises(ConfigError, match=r"--config .*x.yaml: .*lr is written twice"):
        read_yaml(tmp_path / "x.yaml")


def test_value_of_a_view_out_of_range_is_one_sentence():
    with pytest.raises(ConfigError) as error:
        resolve("simclr", {"views": [{"size": 32, "flip": 3.0}]})
    assert str(error.value) == "--views.0: flip: must be a probability between 0 and 1, got 3.0"


def test_deepspeed_config_is_stored_by_its_content(tmp_path):
    """The file may change or be lost before a run is resumed."""
    file = tmp_path / "deepspeed.json"
    file.write_text('{"zero_optimization":\n {"reduce_bucket_size": 8}}')
    config = resolve("dino", {"deepspeed_config": str(file)})
    file.unlink()
    again = resolve("dino", {}, yaml.safe_load(config.to_yaml()))
    assert again.train.deepspeed_config == '{"zero_optimization": {"reduce_bucket_size": 8}}'


@pytest.mark.parametrize("content", [None, "", "[1]", "{"])
def test_deepspeed_config_that_is_no_json_object_is_one_line(tmp_path, content):
    file = tmp_path / "deepspeed.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match="--deepspeed_config: ") as caught:
        resolve("dino", {"deepspeed_config": str(file)})
    assert "\n" not in str(caught.value)
