"""The configuration: precedence, what reads back, and a line for everything that cannot be used."""

import dataclasses
import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain import methods
from fasttrain.config.arguments import parse
from fasttrain.config.recipes import entries, recipe_layers, recipe_names
from fasttrain.config.settings import TrainConfig, resolve
from fasttrain.errors import ConfigError

_PAIRS = [(method, recipe) for method in methods.names() for recipe in recipe_names(method)]


def _parse(*arguments):
    return parse([str(a) for a in arguments])[0]


def _file(folder, text):
    path = folder / "given.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(("method", "recipe"), _PAIRS)
def test_every_recipe_reads_back_to_the_same_configuration(tmp_path, method, recipe, entropy):
    config = resolve(method, {"recipe": recipe, "entropy": entropy, "data_path": "images"})
    assert (config.method, config.recipe, config.entropy) == (method, recipe, entropy)
    assert _parse("--config", _file(tmp_path, config.to_yaml())) == config


@settings(deadline=None, max_examples=50)
@given(
    st.fixed_dictionaries(
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
)
def test_any_values_read_back(values):
    config = resolve("dino", {"recipe": "imagenet", **values})
    file = yaml.safe_load(config.to_yaml())
    again = resolve("dino", {}, file)
    for name in ("global_crops_size", "global_crops_scale", "local_crops_number"):  # part of the views by then
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, **{name: None}))
    assert again == config


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


def test_no_data_path_means_the_demo_and_a_data_path_the_paper(tmp_path):
    assert _parse("--method", "dino").recipe == "demo"
    assert _parse("--method", "dino", "--data_path", "x").recipe == "imagenet"
    assert _parse("--config", _file(tmp_path, "method: dino\ndata_path: x\n")).recipe == "imagenet"
    paper = _parse("--method", "dino", "--data_path", "x")
    assert (paper.views.n_global, paper.views.groups) == (2, ((224, 2), (96, 8)))
    assert dataclasses.replace(paper.train, data_path=None) == TrainConfig(clip_each=True)


def test_with_entropy_lays_its_part_over_the_recipe():
    *base, twin = recipe_layers("demo", "dino", True)
    assert base == recipe_layers("demo", "dino", False)
    assert twin == {"no_centering": True}
    assert not any("with_entropy" in layer for layer in base)
    assert resolve("dino", {"entropy": True}).settings.no_centering
    assert not resolve("dino", {}).settings.no_centering
    assert not resolve("dino", {"entropy": True, "no_centering": False}).settings.no_centering


@pytest.mark.parametrize("method", methods.names())
def test_every_field_is_a_flag_with_dashes_or_underscores(capsys, method):
    with pytest.raises(SystemExit):
        _parse("--method", method, "--help")
    page = capsys.readouterr().out
    for f in [*dataclasses.fields(TrainConfig), *dataclasses.fields(methods.load(method).Settings)]:
        assert f"--{f.name}" in page
        if f.type not in ("bool", "bool | None", "tuple[float, ...]"):
            for spelt in (f.name, f.name.replace("_", "-")):
                with pytest.raises(ConfigError, match=f"argument --{f.name}: expected "):
                    _parse("--method", method, f"--{spelt}")


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        (["--batch-size-per-gpu", "8"], "batch_size_per_gpu", 8),
        (["--batch-size-per-gpu=8"], "batch_size_per_gpu", 8),
        (["--data-path", "my-own--images"], "data_path", "my-own--images"),
        (["--output-dir=a-b"], "output_dir", "a-b"),
        (["--lr", "1e-3"], "lr", 1e-3),
        (["--zero_stage", "2"], "zero_stage", 2),
        (["--precision", "bf16"], "precision", "bf16"),
        (["--deterministic"], "deterministic", True),
        (["--overlap_comm"], "overlap_comm", True),
        (["--zero_stage", "3", "--overlap_comm", "false"], "overlap_comm", False),
        (["--deterministic", "no"], "deterministic", False),
        (["--deterministic=TRUE"], "deterministic", True),
        (["--global_crops_scale", "0.3", "1"], "global_crops_scale", (0.3, 1.0)),
        (["--lr", "1", "--lr", "2"], "lr", 2.0),
    ],
)
def test_flags(given, name, value):
    found = getattr(_parse("--method", "dino", *given).train, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("given", [["--local_rank=0"], ["--local-rank", "3"], ["--local_rank", "0"]])
def test_what_the_launcher_injects_changes_nothing(given):
    assert _parse("--method", "dino", *given) == _parse("--method", "dino")


@pytest.mark.parametrize(
    ("given", "entropy"), [([], False), (["--entropy"], True), (["--entropy", "true"], True), (["--entropy=0"], False)]
)
def test_entropy_is_a_switch(tmp_path, given, entropy):
    assert _parse("--method", "dino", *given).entropy is entropy
    file = _file(tmp_path, "method: dino\nentropy: true\n")
    assert _parse("--config", file, *given).entropy is (entropy or not given)


def test_print_config_is_told_apart():
    assert parse(["--method", "dino"])[1] is False
    assert parse(["--method", "dino", "--print-config"])[1] is True


def test_view_flags_change_the_views_of_their_kind():
    flags = {"global_crops_size": 20, "global_crops_scale": (0.5, 1.0), "local_crops_size": 12}
    flags |= {"local_crops_scale": (0.1, 0.5), "local_crops_number": 5, "recipe": "imagenet"}
    views, plain = resolve("dino", flags).views, resolve("dino", {"recipe": "imagenet"}).views
    assert [(v.size, v.scale, v.count) for v in views.views] == [(20, (0.5, 1.0), 1)] * 2 + [(12, (0.1, 0.5), 5)]
    untouched = {"size": 1, "scale": (0.5, 0.5), "count": 1}
    both = [[dataclasses.replace(v, **untouched) for v in recipe.views] for recipe in (views, plain)]
    assert both[0] == both[1]
    assert plain.groups == ((224, 2), (96, 8))
    assert views.groups == ((20, 2), (12, 5))


def test_no_local_crops_at_all():
    config = resolve("dino", {"local_crops_number": 0, "recipe": "imagenet"})
    assert config.views.n_views == config.views.n_global == 2


def test_numbers_without_a_point_are_numbers_in_yaml(tmp_path):
    config = _parse("--config", _file(tmp_path, "method: dino\nlr: 2e-3\nwarmup_epochs: 3\n"))  # YAML 1.1: text
    assert (config.train.lr, config.train.warmup_epochs) == (0.002, 3.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr: [1, 2\nepochs: }", "is not YAML: while parsing"),
        ("\tlr: 1", "is not YAML: while scanning"),
        ("", "must hold 'name: value' lines"),
        ("- lr\n- epochs", "must hold 'name: value' lines"),
        ("lr", "must hold 'name: value' lines"),
        ("!!python/object/apply:os.mkdir [/tmp/never]", "is not YAML: could not determine a constructor"),
        ("method: dino", "the configuration file is for method 'dino', the command for 'simclr'"),
        ("method: [dino]", r"the configuration file is for method \['dino'\], the command for 'simclr'"),
        ("learning_rat: 1", "setting 'learning_rat' is unknown"),
        ("temprature: 1", "setting 'temprature' is unknown; did you mean temperature?"),
        ("teacher_temp: 1", "setting 'teacher_temp' is unknown"),  # another method's
        ("1: 2", "setting 1 is unknown"),
        ("lr: fast", "--lr: .*number.*, got 'fast'"),
        ("lr: .nan", "--lr must be a finite number, got nan"),
        ("lr:", "--lr: .*number.*, got None"),
        ("epochs: 1.5", "--epochs: .*integer.*, got 1.5"),
        ("entropy: maybe", "--entropy is either true or false, got 'maybe'"),
        ("recipe: [demo]", r"recipe \['demo'\] is unknown for simclr"),
        ("zero_stage: 4", "--zero_stage: .*, got 4"),
        ("{zero_stage: 0, overlap_comm: true}", "--overlap_comm is for --zero_stage 1, 2 and 3, got 0"),
        ("{zero_stage: 0, offload_optimizer: true}", "--offload_optimizer is for --zero_stage 1, 2 and 3, got 0"),
        ("views: [{size: 28, cuont: 2}]", "views: setting 'cuont' is unknown; did you mean count?"),
        ("views: [{size: 28, 3: 2}]", "views: setting 3 is unknown"),
        ("views: [{count: 2}]", "--views.0.size: "),
        ("views: 3", "--views: .*, got 3"),
        ("views: [3]", "--views.0: .*, got 3"),
        ("views: [{size: 28, flip: 2}]", "--views.0: .*flip: .* got 2.0"),
        ("views: [{size: 28, local: true}]", "views: .* got local views only"),
        ("channels: 2", "--channels: .*, got 2"),
        ("mean: [0.5]\nchannels: 3", "mean: .* got 1"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message) as caught:
        _parse("--method", "simclr", "--config", _file(tmp_path, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [bytes(range(256)), b"lr: \xff\xfe", b"\x00\x01"])
def test_a_binary_file_is_no_configuration(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml is not YAML: "):
        _parse("--config", tmp_path / "config.yaml")


def test_a_folder_is_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        _parse("--config", tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *(({name: 0}, f"--{name} must be at least 1, got 0") for name in ("epochs", "batch_size_per_gpu", "log_every")),
        ({"gradient_accumulation_steps": -1}, "--gradient_accumulation_steps must be at least 1, got -1"),
        ({"limit_steps": 0}, "--limit_steps must be at least 1, got 0"),
        ({"saveckp_freq": 0}, "--saveckp_freq must be at least 1, got 0"),
        *(
            ({name: -1}, f"--{name} must be at least 0, got -1")
            for name in ("seed", "num_workers", "knn_every", "saveckp_freq_steps")
        ),
        ({"seed": 2**63}, "--seed must be below 2"),
        *(({name: math.inf}, f"--{name} must be a finite number") for name in ("lr", "weight_decay", "clip_grad")),
        ({"max_bad_fraction": 1.5}, "--max_bad_fraction must be between 0 and 1, got 1.5"),
        ({"max_bad_fraction": math.nan}, "--max_bad_fraction must be a finite number, got nan"),
        ({"warmup_epochs": -0.5}, "--warmup_epochs must be at least 0, got -0.5"),
        ({"optimizer": "adamv"}, "optimizer 'adamv' is unknown; did you mean adamw"),
        ({"global_crops_size": 0}, "size: .* got 0"),
        ({"local_crops_number": -1, "recipe": "imagenet"}, "count: .* got -1"),
        ({"local_crops_number": 2}, "--local_crops_number: the recipe has no local views to change"),
        ({"global_crops_scale": (0.0, 1.0)}, "scale: must be two area fractions"),
        ({"global_crops_scale": (0.5, 0.4)}, "scale: must be two area fractions"),
    ],
)
def test_values_out_of_range_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        resolve("dino", values)


def test_paths_that_mean_the_same_in_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    given = resolve("dino", {"data_path": "shards/{000..146}.tar", "val_path": "~/val"})
    whole = given.anywhere().train
    assert (whole.data_path, whole.val_path) == (f"{tmp_path}/shards/{{000..146}}.tar", "/home/me/val")
    assert given.anywhere() == given.anywhere().anywhere()
    for path in (None, "in memory: array"):
        values = {} if path is None else {"data_path": path}
        assert resolve("dino", values).anywhere().train.data_path == path


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("dino", {"momentum_teacher": 1.5}, "--momentum_teacher must be between 0 and 1, got 1.5"),
        ("byol", {"momentum_teacher": -0.5}, "--momentum_teacher must be between 0 and 1, got -0.5"),
        ("dino", {"center_momentum": 2}, "--center_momentum must be between 0 and 1, got 2"),
        ("infomin", {"beta": 2}, "--beta must be between 0 and 1, got 2"),
        *(
            (method, {"temperature": 0}, "--temperature must be above 0, got 0")
            for method in ("simclr", "mocov3", "cmc")
        ),
        ("simsiam", {"kappa": 0}, "--kappa must be above 0, got 0"),
        ("byol", {"kappa": math.nan}, "--kappa must be a finite number, got nan"),
        ("dino", {"teacher_temp": 0}, "--teacher_temp must be above 0, got 0"),
        ("dino", {"out_dim": 0}, "--out_dim must be at least 2, got 0"),
        ("swav", {"epsilon": -0.05}, "--epsilon must be above 0, got -0.05"),
        ("moco", {"bn_splits": 0}, "--bn_splits must be at least 1, got 0"),
        ("mocov3", {"hidden_dim": -3}, "--hidden_dim must be at least 1, got -3"),
        ("deepcluster", {"cluster_heads": 0}, "--cluster_heads must be at least 1, got 0"),
        ("simclr", {"num_heads": 0}, "--num_heads must be at least 1, got 0"),
        ("simclr", {"drop_path_rate": 1.5}, "--drop_path_rate must be between 0 and 1, got 1.5"),
    ],
)
def test_a_methods_own_values_have_ranges_too(method, values, message):
    """Some once trained, a teacher that runs away among them, and others stopped in the first step."""
    with pytest.raises(ConfigError, match=message):
        resolve(method, values)


@pytest.mark.parametrize("method", methods.names())
def test_every_number_of_a_method_has_a_range(method):
    for cls in (TrainConfig, methods.load(method).Settings):
        for f in dataclasses.fields(cls):
            if isinstance(f.default, int | float) and not isinstance(f.default, bool):
                assert f.metadata["least"] is not None or f.metadata["above"] is not None, f.name


def test_help_needs_no_method(capsys):
    """It once asked for --method."""
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    assert "usage: fasttrain train" in capsys.readouterr().out


def test_recipes_are_known_by_their_files():
    assert recipe_names("no_such_method") == []
    assert {"cifar", "demo", "imagenet"} <= set.intersection(*(set(recipe_names(name)) for name in methods.names()))
    assert {"imagenet-vit_base_16", "imagenet-vit_base_8"} <= set(recipe_names("dino"))
    with pytest.raises(ValueError, match="recipe 'cifar' is unknown for no_such_method"):
        recipe_layers("cifar", "no_such_method", False)


def test_every_recipe_says_what_was_published_and_where_it_is_from():
    found = entries()
    assert {(e.method, e.recipe) for e in found} == set(_PAIRS)
    for entry in found:
        assert entry.source
        assert entry.published
        assert entry.epochs == resolve(entry.method, {"recipe": entry.recipe, "data_path": "x"}).train.epochs


def test_a_list_of_numbers_is_a_flag(tmp_path):
    given = ("--method", "moco", "--data_path", "x", "--lr_drops")
    assert _parse(*given, "120", "160").train.lr_drops == (120.0, 160.0)
    assert _parse(*given).train.lr_drops == ()
