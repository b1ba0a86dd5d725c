"""Test that the documentation builds without a warning, and that its commands, names, messages and tables exist."""

import ast
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from bench import tables
from fasttrain import cli, methods
from fasttrain.cli import eval as evaluation
from fasttrain.cli import export as exporting
from fasttrain.cli import plan as planning
from fasttrain.cli import report as reporting
from fasttrain.cli import views
from fasttrain.cli.source import SourceOptions
from fasttrain.config.arguments import _parser
from fasttrain.config.resolve import resolve
from fasttrain.methods import registry
from fasttrain.pipelines import View
from tests.doc_commands import DOCS, PAGES, commands, fasttrain_words, shell_commands

_ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path):
    """A page without a place in the navigation is a warning too."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    process = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    for page in DOCS:
        folder = "" if page.stem == "index" else page.stem
        assert (tmp_path / "site" / folder / "index.html").is_file()
    api = (tmp_path / "site/api/index.html").read_text()
    names = ["fasttrain.train", "fasttrain.Result.report", "fasttrain.losses.NTXentLoss", "fasttrain.kernels.nt_xent"]
    assert [name for name in names if f'id="{name}"' not in api] == []
    assert not re.search(r":(?:class|func|meth|mod):", api)


class Parsed(Exception):
    """Raised where a command has checked its arguments and starts its work."""


@pytest.fixture
def parse_only(monkeypatch):
    """End each command where its work starts, and forget the methods that plugins register."""

    def end(*arguments, **options):
        raise Parsed

    for module, name in (
        (evaluation, "open_backbone"),
        (exporting, "open_backbone"),
        (planning, "forecast"),
        (reporting, "write_report"),
        (views, "contact_sheet"),
    ):
        monkeypatch.setattr(module, name, end)
    monkeypatch.setattr(registry, "_registered", {name: methods.load(name) for name in methods.names()})


def _status(words):
    """Return the exit status of ``fasttrain`` with these words."""
    try:
        return cli.main([*words, "--print_config"] if words[0] == "train" else words)
    except Parsed:
        return 0
    except SystemExit as end:  # --help
        return end.code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_parse(page, parse_only, capsys):
    errors = [(shlex.join(words), capsys.readouterr().err) for words in commands(page) if _status(words) != 0]
    assert errors == []


@pytest.mark.parametrize("words", ["train --method dino --entropie", "eval runs/it --metric knn", "export x", "report"])
def test_commands_with_an_error_do_not_parse(words, parse_only):
    assert _status(words.split()) == 2


def test_commands_are_read_from_blocks_and_sentences():
    text = """
```bash
python3 -m venv .venv && . .venv/bin/activate && deepspeed --no_ssh fasttrain/run.py --method dino ...  # so
torchrun --nproc_per_node 2 --no-python fasttrain eval 'a b'; sbatch examples/slurm.sh --method byol
```
"""
    parsed = [words for words in map(fasttrain_words, shell_commands(text)) if words]
    assert parsed == [["train", "--method", "dino"], ["eval", "a b"], ["train", "--method", "byol"]]
    assert ["train", "--method", "simclr", "--data_path", "/data/imagenet"] in commands(_ROOT / "docs" / "scaling.md")


def test_scripts_and_modules_in_commands_exist():
    text = "\n".join(page.read_text() for page in [*PAGES, _ROOT / "CONTRIBUTING.md"])
    words = {word for command in shell_commands(text) for word in command}
    scripts = {word for word in words if re.fullmatch(r"(examples|fasttrain)/[\w/]+\.(py|sh)", word)}
    modules = set(re.findall(r"python -m (bench\.[\w.]+\w)", text))
    assert len(scripts) > 2
    assert len(modules) > 15
    assert {script for script in scripts if not (_ROOT / script).is_file()} == set()
    assert {module for module in modules if find_spec(module) is None} == set()


def _replacements(pattern):
    """Return the matches of a pattern in the last cells of migration.md's tables with two columns."""
    cells = re.findall(r"^\|[^|]*\|([^|]*)\|$", (_ROOT / "docs" / "migration.md").read_text(), re.M)
    return {match for cell in cells for match in re.findall(pattern, cell)}


def test_flags_that_replace_flags_of_others_exist():
    named = _replacements(r"`(--\w+)")
    parsers = [_parser(methods.load(name)) for name in methods.names()]
    flags = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    assert len(named) > 40
    assert named - flags - {f"--{field.name}" for field in fields(SourceOptions)} == set()


def test_imports_that_replace_imports_of_others_work():
    imports = _replacements(r"`(from fasttrain[^`]*)`")
    assert len(imports) > 6
    for line in imports:
        exec(line, {})


def _templates():
    """Yield every string of the sources, with ``…`` for each value that is filled in."""
    for folder in ("fasttrain", "kernels", "pipelines"):
        for path in (_ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                    yield re.sub("…+", "…", "".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_messages_of_troubleshooting_are_in_the_code():
    """A quote is a part of a message, in which ``…`` replaces any text."""
    page = (_ROOT / "docs" / "troubleshooting.md").read_text()
    quotes = re.findall(r"^- `([^`]+)`:", page, re.M)
    assert len(quotes) == len(re.findall(r"^- ", page, re.M)) > 40
    templates = "\0".join(_templates())
    patterns = {quote: "[^\0]*".join(map(re.escape, quote.split("…"))) for quote in quotes}
    assert [quote for quote, pattern in patterns.items() if not re.search(pattern, templates)] == []


def test_tables_match_the_results():
    """``python -m bench.tables`` rewrites them."""
    texts = {page.name: page.read_text() for page in tables.pages()}
    assert [name for name, text in texts.items() if tables.rendered(text) != text] == []
    names = [name for text in texts.values() for name in re.findall(r"<!-- table: ([\w-]+) -->", text)]
    assert sorted(names) == sorted(tables.TABLES)


def test_tables_between_markers_are_replaced():
    page = "before\n<!-- table: weak -->\n| old |\n<!-- end -->\nafter\n"
    lines = tables.rendered(page).splitlines()
    assert [lines[0], *lines[-2:]] == ["before", "<!-- end -->", "after"]
    assert "| old |" not in lines
    assert lines[2].count("|") == lines[4].count("|") > 5


@pytest.mark.parametrize("method", methods.names())
def test_views_of_recipes_have_the_settings_of_the_page(method):
    """docs/data.md states these settings once for all views."""
    for view in resolve(method, {"recipe": "imagenet"}).views.views:
        assert (view.flip, view.jitter_p, view.ratio, view.blur_sigma) == (0.5, 0.8, (3 / 4, 4 / 3), (0.1, 2.0))


def test_view_keys_and_yaml_example_of_the_page_are_valid():
    page = (_ROOT / "docs" / "data.md").read_text()
    keys = re.findall(r"^\| (`[^|]*`) \|", page.partition("without it |\n")[2], re.M)
    assert {name.strip("` ") for cell in keys for name in cell.split(",")} == set(View.__dataclass_fields__)
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    config = resolve("dino", {"data_path": "-"}, yaml.safe_load(block))
    assert (config.views.n_views, config.views.n_global) == (6, 2)
