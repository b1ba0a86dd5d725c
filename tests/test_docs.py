"""The documentation: it builds without a warning, its commands parse, its figures and messages are the real ones."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest
import yaml

from fasttrain import cli, methods
from fasttrain.cli import eval as evaluation
from fasttrain.cli import export as exporting
from fasttrain.cli import plan as planning
from fasttrain.cli import report as reporting
from fasttrain.config.resolve import resolve
from fasttrain.pipelines import View
from fasttrain.report import contact_sheet as views
from tests.doc_commands import DOCS, PAGES, commands, ours, shell_commands

_ROOT = Path(__file__).parent.parent


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in DOCS:
        folder = "" if page.stem == "index" else page.stem
        assert (tmp_path / "site" / folder / "index.html").is_file()
    api = (tmp_path / "site/api/index.html").read_text()
    names = ["fasttrain.train", "fasttrain.Result.report", "fasttrain.losses.NTXentLoss", "fasttrain.kernels.nt_xent"]
    assert [name for name in names if f'id="{name}"' not in api] == []
    assert not re.search(r":(?:class|func|meth|mod):", api)


def test_every_page_has_its_place_in_the_navigation():
    pages = [page for entry in yaml.safe_load((_ROOT / "mkdocs.yml").read_text())["nav"] for page in entry.values()]
    there = {page.name for page in DOCS}
    assert there == set(pages)


def test_the_readme_leads_to_every_page():
    readme = (_ROOT / "README.md").read_text()
    assert [page.name for page in DOCS if f"(docs/{page.name})" not in readme] == []


@pytest.fixture
def nothing_runs(monkeypatch):
    """The commands parse and check what they are given, and stop there."""
    picture = SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr(evaluation, "_evaluate", lambda given: 0)
    monkeypatch.setattr("fasttrain.pretrained.open_backbone", lambda given: SimpleNamespace(name="it"))
    monkeypatch.setattr(exporting, "_publish", lambda path, write: "")
    monkeypatch.setattr(planning, "forecast", lambda *given: SimpleNamespace(chosen=0))
    monkeypatch.setattr(planning, "show", lambda found: None)
    monkeypatch.setattr(planning, "_write", lambda path, found: None)
    monkeypatch.setattr(reporting, "report", lambda runs, output, images: (Path("report.html"), 0))
    monkeypatch.setattr(views, "contact_sheet", lambda config, count: picture)


def _status(words):
    """The exit status of ``fasttrain`` with these words."""
    if words[0] == "train":
        words = [*words, "--print_config"]
    try:
        return cli.main(words)
    except SystemExit as end:  # --help
        return end.code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_parses(page, nothing_runs, capsys):
    wrong = []
    for words in commands(page):
        if _status(words) != 0:
            wrong.append((shlex.join(words), capsys.readouterr().err))
    assert wrong == []


@pytest.mark.parametrize("words", ["train --method dino --entropie", "eval runs/it --metric knn", "export x", "report"])
def test_a_wrong_command_would_be_seen(words, nothing_runs):
    assert _status(words.split()) == 2


def test_commands_are_found_in_all_their_forms():
    text = """
```bash
python3 -m venv .venv && . .venv/bin/activate && deepspeed --no_ssh fasttrain/run.py --method dino ...  # so
torchrun --nproc_per_node 2 --no-python fasttrain eval 'a b'; sbatch examples/slurm.sh --method byol
```
"""
    found = [words for words in map(ours, shell_commands(text)) if words]
    assert found == [["train", "--method", "dino"], ["eval", "a b"], ["train", "--method", "byol"]]
    assert len(commands(_ROOT / "README.md")) > 8
    assert len(commands(_ROOT / "docs" / "scaling.md")) > 8


def test_scripts_that_commands_name_are_there():
    named = {word for page in PAGES for words in shell_commands(page.read_text()) for word in words}
    scripts = {word for word in named if re.fullmatch(r"(bench|examples|fasttrain)/[\w/]+\.(py|sh)", word)}
    assert len(scripts) > 3
    assert [script for script in sorted(scripts) if not (_ROOT / script).is_file()] == []


def _flags():
    """All flags of all commands."""
    from fasttrain.config.arguments import _parser

    parsers = [planning._parser(), *(_parser(methods.load(name)) for name in methods.names())]
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    sources = [_ROOT / "fasttrain" / name / "command.py" for name in ("evaluate", "export", "report")]
    text = "".join(path.read_text() for path in [*sources, _ROOT / "fasttrain" / "backbones.py"])
    return known | set(re.findall(r'add_argument\("(--\w+)"', text)) | {"--views"}


def test_flags_that_take_the_place_of_others_exist():
    rows = re.findall(r"^\|[^|]*\|([^|]*)\|$", (_ROOT / "docs" / "migration.md").read_text(), re.M)
    named = {flag for cell in rows for flag in re.findall(r"`(--\w+)", cell)}
    assert len(named) > 40
    assert named - _flags() == set()


def test_imports_that_take_the_place_of_others_work():
    rows = re.findall(r"^\|[^|]*\|([^|]*)\|$", (_ROOT / "docs" / "migration.md").read_text(), re.M)
    imports = {line for cell in rows for line in re.findall(r"`(from fasttrain[^`]*)`", cell)}
    assert len(imports) > 6
    for line in imports:
        exec(line, {})


def _templates():
    """Every text in the sources, with ``…`` for what is filled in."""
    for folder in ("fasttrain", "kernels", "pipelines"):
        for path in (_ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                    yield re.sub("…+", "…", "".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_every_message_is_in_the_code():
    page = (_ROOT / "docs" / "troubleshooting.md").read_text()
    messages = [" ".join(message.split()) for message in re.findall(r"^- `([^`]+)`:", page, re.M)]
    assert len(messages) == len(re.findall(r"^- ", page, re.M)) > 40
    templates = set(_templates())
    assert [message for message in messages if not any(message in template for template in templates)] == []


def _rows(page, table):
    text = (_ROOT / "docs" / page).read_text().partition(f"<!-- {table} -->\n")[2]
    rows = [[cell.strip(" `") for cell in line[1:-1].split("|")] for line in text.split("\n\n")[0].splitlines()[2:]]
    return {name: cells for name, *cells in rows}


def test_the_measured_table_is_what_was_measured():
    results = json.loads((_ROOT / "bench/results/kernels-cpu.json").read_text())["results"]
    rows = _rows("kernels.md", "kernels-cpu")
    assert len(rows) > 12
    for case, cells in rows.items():
        ours, peers = results[case]["ours"], results[case]["peers"]
        wanted = [f"{ours['seconds']['min'] * 1e3:.3g} ms, {ours['peak_bytes'] / 2**20:.3g} MiB"]
        for name in ("eager", "torch.compile", "lightly"):
            peer = peers.get(name)
            wanted.append(f"{peer['ratio']['median']:.2g}x, {peer['peak_ratio']:.3g}x" if peer else "")
        assert cells == wanted, case


def test_the_h100_table_is_what_was_measured():
    parts = json.loads((_ROOT / "bench/results/nvidia-h100-80gb-hbm3.json").read_text())["parts"]
    measured = [*parts["losses"]["rows"], *parts["prototype_losses"]["rows"]]
    rows = _rows("kernels.md", "kernels-h100")
    assert len(rows) == len(measured) > 10
    for row, (case, cells) in zip(measured, rows.items(), strict=True):
        assert case.startswith(f"{row['operation']} B={row['batch']} ")
        ours = row["contestants"]["ours"]
        wanted = [f"{ours['seconds']['min'] * 1e3:.3g} ms, {ours['peak_bytes'] / 2**20:.3g} MiB"]
        wanted.append(f"{row['pct_of_roofline']:.2g} %")
        for name in ("eager", "lightly", "inf-cl"):
            peer = row["contestants"].get(name)
            if peer is None:
                wanted.append("")
            elif peer["fault"]:
                wanted.append({"OOM": "out of memory"}[peer["fault"]])
            else:
                wanted.append(f"{peer['ratio']:.3g}x, {peer['peak_bytes'] / ours['peak_bytes']:.3g}x")
        assert cells == wanted, case


def test_the_bound_s_table_is_what_runs_gave():
    runs = json.loads((_ROOT / "bench/results/evidence/learns-digits.json").read_text())["runs"]
    rows = _rows("idea.md", "learns-digits")
    assert len(rows) == 10
    for method, cells in rows.items():
        seeds = [[run for run in runs if run["run"] == method + twin] for twin in ("", "+er")]
        wanted = [
            f"{mean(run[name] for run in found):.{digits}f}"
            for found in seeds
            for name, digits in (("information", 2), ("deficit", 2), ("knn_top1", 3))
        ]
        assert cells == wanted, method


def _number(view, first):
    return f"view {first}" if view.count == 1 else f"views {first} to {first + view.count - 1}"


def test_the_views_are_those_of_the_published_recipes():
    wanted = {}
    for method in methods.names():
        recipe, first = resolve(method, {"recipe": "imagenet"}).views, 0
        for view in recipe.views:
            more = ["local"] * view.local + [f"jigsaw {view.jigsaw} x {view.jigsaw}"] * bool(view.jigsaw)
            more += [f"RandAugment {view.rand_augment}"] * bool(view.rand_augment)
            more += [recipe.color_space] * (recipe.color_space != "rgb") + [recipe.interpolation]
            chances = [f"{p:g}" if p else "" for p in (view.grey, view.blur, view.solarize)]
            jitter = " ".join(f"{s:g}" for s in view.jitter) if any(view.jitter) else ""
            area = f"{100 * view.scale[0]:g} to {100 * view.scale[1]:g} %"
            wanted[f"{method}, {_number(view, first)}"] = [str(view.size), area, jitter, *chances, ", ".join(more)]
            assert (view.flip, view.jitter_p, view.ratio, view.blur_sigma) == (0.5, 0.8, (3 / 4, 4 / 3), (0.1, 2.0))
            first += view.count
    assert _rows("data.md", "views") == wanted


def test_the_view_s_keys_are_those_that_a_view_has():
    keys = re.findall(r"^\| (`[^|]*`) \|", (_ROOT / "docs/data.md").read_text().partition("without it |\n")[2], re.M)
    assert {name.strip("` ") for cell in keys for name in cell.split(",")} == set(View.__dataclass_fields__)


def test_the_loader_s_table_is_what_was_measured():
    results = json.loads((_ROOT / "bench/results/data-cpu.json").read_text())["results"]
    wanted = {}
    for case, sides in results.items():
        for who, side in sides.items():
            speed, cpu = side["images_per_s"]["median"], side["cpu_ms_per_image"]["median"]
            ratio = "{median:.1f}x ({min:.1f} to {max:.1f})".format(**side["ratio"]) if "ratio" in side else ""
            wanted[f"{case}: {who}"] = [f"{speed:,.0f}", f"{cpu:.2g}", f"{side['memory_mib']:.0f}", ratio]
    assert _rows("data.md", "data-cpu") == wanted


def test_the_table_of_start_up_is_what_was_measured():
    results = json.loads((_ROOT / "bench/results/data-index.json").read_text())
    wanted = {
        name: [f"{found['images']:,}", f"{found.get('cpu_seconds', found['seconds']):.2g}"]
        + [f"{found[key]:.0f}" for key in ("held_mib", "peak_mib")]
        for name, found in results.items()
        if isinstance(found, dict)
    }
    assert _rows("data.md", "data-index") == wanted


def test_the_views_of_an_example_are_accepted():
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", (_ROOT / "docs/data.md").read_text(), re.M | re.S)
    config = resolve("dino", {"data_path": "-"}, yaml.safe_load(block))
    assert (config.views.n_views, config.views.n_global) == (6, 2)
