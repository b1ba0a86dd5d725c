"""The registry: built-in methods, decorated classes, entry points and plugin files."""

import importlib.metadata

import pytest

from fasttrain import methods
from fasttrain.errors import ConfigError
from fasttrain.methods import Method, registry

PLUGIN = """
from fasttrain.methods import Method, register

@register("from_a_file")
class FromFile(Method):
    pass
"""


@pytest.fixture(autouse=True)
def _clean_registry(monkeypatch):
    """Restore the registry after a test. Built-in modules register once, when they are imported."""
    for name in registry.BUILT_IN:
        methods.load(name)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def test_every_built_in_method_registers_itself_with_its_name():
    for name in registry.BUILT_IN:
        assert methods.load(name).__module__ == f"fasttrain.methods.{name}"
    assert set(registry.BUILT_IN) <= set(methods.names())


def test_every_built_in_method_declares_its_family_and_space():
    for name in registry.BUILT_IN:
        cls = methods.load(name)
        assert cls.family in ("contrastive", "clustering", "distillation", "regularised")
        assert cls.space in ((None,) if cls.family == "regularised" else ("sphere", "prototypes"))


def test_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"--method: 'dinno'.*byol, cmc, deepcluster, dino"):
        methods.load("dinno")


def test_registered_class_is_loaded_by_its_name():
    cls = type("Own", (Method,), {})
    assert methods.register("own_class")(cls) is cls
    assert methods.load("own_class") is cls
    assert registry.name_of(cls) == "own_class"
    assert "own_class" in methods.names()


def test_register_replaces_a_class_that_a_notebook_defines_again():
    first, second = (type("Own", (Method,), {}) for _ in range(2))
    methods.register("twice")(first)
    methods.register("twice")(second)
    assert methods.load("twice") is second


@pytest.mark.parametrize("name", ["taken", "simclr"])
def test_register_refuses_a_name_of_another_class(name):
    methods.register("taken")(type("First", (Method,), {}))
    with pytest.raises(ValueError, match=name):
        methods.register(name)(type("Second", (Method,), {}))


def test_name_of_an_unregistered_class_is_refused():
    with pytest.raises(ConfigError, match="Stranger"):
        registry.name_of(type("Stranger", (Method,), {}))


def test_entry_point_is_loaded_at_first_use(monkeypatch):
    point = importlib.metadata.EntryPoint("packaged", f"{__name__}:Packaged", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group, **names: [point])
    assert "packaged" in methods.names()
    assert methods.load("packaged") is Packaged


def test_entry_point_to_something_else_is_refused(monkeypatch):
    point = importlib.metadata.EntryPoint("packaged", "json:dumps", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group, **names: [point])
    with pytest.raises(ValueError, match="json:dumps"):
        methods.load("packaged")


class Packaged(Method):
    """A method of another package."""


def test_plugin_file_loaded_twice_registers_its_method_once(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(PLUGIN)
    methods.load_plugin(path)
    methods.load_plugin(path)
    assert methods.load("from_a_file").__name__ == "FromFile"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise ValueError('two' + chr(10) + 'lines')", "two lines"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("x = 1", "registers no method"),
        (PLUGIN.replace("from_a_file", ""), "name"),
        (PLUGIN.replace("(Method)", ""), "subclass of Method"),
        (PLUGIN + "\n    recipes = 'nope'\n", "recipes: .*simclr"),
        (PLUGIN + "\n    class Settings: pass\n", "Settings: .*dataclass"),
    ],
)
def test_invalid_plugin_is_refused_in_one_line(tmp_path, content, reason):
    path = tmp_path / "bad.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=reason) as refusal:
        methods.load_plugin(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
