"""A method outside the package: examples/own_method.py, by the command and from Python, and a backbone as a module."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fasttrain
from fasttrain.cli import main
from fasttrain.methods import load_plugin, registry
from fasttrain.pretrained import from_run

_EXAMPLE = Path(__file__).parent.parent / "examples/own_method.py"
_FEW = ("--limit_steps", "2", "--log_every", "1", "--knn_every", "0")


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """A run of the example by the command, as a user starts it."""
    output = tmp_path_factory.mktemp("own") / "run"
    command = [sys.executable, str(_EXAMPLE.parents[1] / "fasttrain/run.py"), "--method", "own"]
    command += ["--plugin", str(_EXAMPLE), *_FEW, "--output_dir", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return output


def test_example_has_at_most_80_lines():
    assert len(_EXAMPLE.read_text().splitlines()) <= 80


def test_own_method_logs_its_scalars_and_no_bound(own_run):
    lines = [json.loads(line) for line in (own_run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert line["loss"] == pytest.approx(line["alignment"] + line["uniformity"], rel=1e-4)
        assert line["information"] is None
    assert json.loads((own_run / "summary.json").read_text())["entropy"] is None


@pytest.mark.parametrize(
    ("correct", "wrong", "match"),
    [
        ("return Objective(loss, projections=z.detach().flatten(0, 1), logs=logs)", "return loss", "Objective"),
        ("Objective(loss,", "Objective(loss.detach(),", "Objective.loss"),
        ('logs = {"alignment": alignment.detach()', 'logs = {"alignment": z.detach()', "alignment"),
        ('"uniformity": uniformity.detach()', '"uniformity": 0.5', "uniformity"),
        ('logs = {"alignment":', 'logs = {"entropy":', "'entropy'"),
        ("self.student = Branch(backbone, head)", "self.branch = Branch(backbone, head)", "self.student"),
        ("out_dim: Count", "lr: Count", "--lr"),
        ("out_dim: Count", "config: Count", "--config"),
    ],
)
def test_mistake_in_the_code_of_a_method_is_one_line(correct, wrong, match, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    code = _EXAMPLE.read_text()
    assert correct in code
    (tmp_path / "wrong.py").write_text(code.replace(correct, wrong))
    arguments = ["train", "--method", "own", "--plugin", str(tmp_path / "wrong.py"), *_FEW]
    assert main([*arguments, "--output_dir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert match in line


def test_own_method_trains_the_same_from_python(own_run, tmp_path):
    result = fasttrain.train(
        "own", plugin=_EXAMPLE, limit_steps=2, log_every=1, knn_every=0, output_dir=tmp_path / "run"
    )
    expected = [json.loads(line)["loss"] for line in (own_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in result.metrics] == pytest.approx(expected, rel=1e-4)


def test_run_of_a_plugin_is_evaluated_and_reported_with_it(own_run, capsys):
    options = ["--plugin", str(_EXAMPLE)]
    assert main(["report", str(own_run), "--images", "0", *options]) == 0
    assert "alignment" in (own_run / "report.html").read_text()
    load_plugin(_EXAMPLE)
    assert from_run(own_run).name == "own student, step 2"


@pytest.mark.slow
def test_stored_plugin_is_named_but_never_run(own_run):
    """A stored configuration must not run code: another process gets one line that names the file."""
    code = "import sys; from fasttrain.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "eval", str(own_run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert f"--plugin {_EXAMPLE}" in done.stderr


def test_entropy_of_a_method_without_a_bound_is_refused(capsys):
    assert main(["train", "--method", "own", "--plugin", str(_EXAMPLE), "--entropy"]) == 2
    assert "--entropy" in capsys.readouterr().err


class Tiny(nn.Module):
    """A backbone of a user: features [B, 8] of grey images."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x):
        """Return the features."""
        return self.layers(x)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr", "byol"])
def test_model_is_copied_trained_from_its_weights_and_returned(method, tmp_path):
    torch.manual_seed(3)
    model = Tiny()
    before = model.layers[0].weight.detach().clone()
    options = {"log_every": 1, "knn_every": 0, "hidden_dim": 16, "out_dim": 8, "output_dir": tmp_path / "run"}
    result = fasttrain.train(method, model=model, limit_steps=1, lr=0.0, warmup_epochs=0, **options)
    assert isinstance(result.network, Tiny)
    torch.testing.assert_close(result.network.layers[0].weight, before)  # a learning rate of 0
    result = fasttrain.train(method, model=model, limit_steps=2, lr=1.0, warmup_epochs=0, resume="never", **options)
    assert torch.equal(model.layers[0].weight, before)
    assert not torch.equal(result.network.layers[0].weight, before)


def test_model_as_a_function_is_built_by_channels(tmp_path):
    channels = []

    def build(count):
        channels.append(count)
        return Tiny()

    options = {"knn_every": 0, "limit_steps": 1, "hidden_dim": 16, "output_dir": tmp_path / "run"}
    assert isinstance(fasttrain.train("simclr", model=build, **options).network, Tiny)
    assert set(channels) == {1}


def test_model_without_pooled_features_is_refused(tmp_path):
    with pytest.raises(fasttrain.ConfigError, match="model"):
        fasttrain.train("simclr", model=nn.Conv2d(1, 4, 3), limit_steps=1, output_dir=tmp_path / "run")


def test_run_with_a_module_names_the_python_way_to_load_it(tmp_path, capsys):
    options = {"knn_every": 0, "limit_steps": 1, "hidden_dim": 16, "output_dir": tmp_path / "run"}
    fasttrain.train("simclr", model=Tiny(), **options)
    assert main(["eval", str(tmp_path / "run")]) == 2
    assert "from_run" in capsys.readouterr().err
    assert isinstance(from_run(tmp_path / "run", network=Tiny()).network, Tiny)
