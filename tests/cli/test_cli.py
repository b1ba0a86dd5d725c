"""What all commands share: dispatch, help, one line and status 2 for invalid input, and missing packages."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fasttrain.cli import _COMMANDS, main
from tests.small_runs import flags, start

pytestmark = pytest.mark.usefixtures("one_thread")

_ROOT = Path(__file__).parents[2]
_WITHOUT_PYDANTIC = "import sys; sys.modules['pydantic'] = None; from fasttrain.cli import main; sys.exit(main())"
_LOADING = "fasttrain: loading torch and DeepSpeed\n"
_NEEDED = {"train": ["--method", "dino"], "plan": ["--method", "dino"], "views": ["--method", "dino"]}


def _error(capsys, arguments):
    """Run a command that must fail with status 2; return its only line on stderr."""
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("fasttrain: ")
    return line


def test_commands_are_listed_and_dispatched(capsys, monkeypatch):
    for arguments in (["--help"], []):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert all(f"  {name} " in out for name in _COMMANDS)
    assert "trian" in _error(capsys, ["trian"])
    monkeypatch.setattr("fasttrain.cli.doctor.main", lambda _: 7)
    assert main(["doctor"]) == 7


@pytest.mark.parametrize("command", sorted(_COMMANDS.keys() - {"doctor"}))
def test_help_page_starts_with_the_usage(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: fasttrain {command} ")


@pytest.mark.parametrize("command", sorted(_COMMANDS.keys() - {"doctor"}))
def test_unknown_flag_is_refused_with_the_nearest_one(command, capsys):
    line = _error(capsys, [command, *_NEEDED.get(command, []), "--outpu", "x"])
    assert "--outpu" in line
    assert "--output" in line


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["train", "--method", "dino", "--epochs", "0"], "--epochs: .*1, got 0"),
        (["plan", "--method", "dino", "--nodes", "0"], "--nodes: .*1, got 0"),
        (["plan", "--method", "dino", "--gpus_per_node", "-1"], "--gpus_per_node: .*-1"),
        (["plan", "--method", "dino", "--flops_fraction", "1.5"], "--flops_fraction: .*1.5"),
        (["plan", "--method", "dino", "--latency", "nan"], "--latency: .*nan"),
        (["plan", "--method", "dino", "--network", "0"], "--network: .*0"),
        (["plan", "--method", "dino", "--gpu", "h1000"], "'?h1000'?"),
        (["eval", "run", "--linear_epochs", "0"], "--linear_epochs: .*0"),
        (["eval", "run", "--lidar_images", "1"], "--lidar_images: .*1"),
        (["eval", "run", "--knn_k", "5", "0"], "--knn_k.*0"),
        (["eval", "run", "--metrics", "knn", "speed"], "--metrics.*'speed'"),
        (["eval", "run", "--seed", "-1"], "--seed: .*-1"),
        (["eval", "run", "--size", "0"], "--size: .*0"),
        (["eval"], r"RUN\|FILE: .*--timm"),
        (["eval", "--timm", "resnet18", "--data_path", "/none"], "/none: no such folder"),
        (["eval", "--timm", "resnet18", "--data_path", ""], "--data_path: must not be empty"),
        (["eval", "--timm", "resnet18", "--output", "/"], "--output /: is a folder"),
        (["eval", "--timm", "vit_tiny_patch16_224", "--size", "40"], "--size: .*16"),
        (["eval", "--timm", "vgg11", "--size", "16"], "--size: VGG .*16 pixels"),
        (["export", "run"], "--format: .*timm"),
        (["export", "run", "--format", "timm"], "--output: is missing"),
        (["export", "run", "--format", "timm", "--output", "x.pth"], "--output x.pth: .*.safetensors"),
        (["export", "run", "--format", "onnx", "--output", "x"], "--output x: .*.onnx"),
        (["export", "run", "--format", "dino", "--output", "x.pth", "--which", "student"], "--which: .*dino"),
        (["export", "--format", "onnx", "--output", "x.onnx"], r"RUN\|FILE: .*--timm"),
        (["export", "run", "--format", "onnx", "--output", "x.onnx"], "run: no such run or file"),
        (["export", "run", "--format", "onnx", "--output", "x.onnx", "--size", "3"], "--size: needs --timm"),
        (["plan", "--method", "dino", "--nodes", "100000"], "larger than the data .1281167"),
        (["plan", "--method", "dino", "--arch", "vit_smal"], "'vit_smal'"),
        (["plan", "--method", "dino", "--output", "/nowhere/plan.json"], "--output /nowhere/plan.json.*folder"),
        (["report"], "RUN"),
        (["report", "/no/such"], "/no/such: no such run"),
        (["report", "EMPTY"], "EMPTY.*no step"),
        (["export", "run", "--format", "tflite"], "--format: .*tflite"),
        (["report", "run", "--images", "-1"], "--images: .*-1"),
        (["views", "--method", "dino", "--images", "0"], "--images: .*0"),
        (["train", "--method", "dino", "--epochs", "three"], "--epochs: .*'three'"),
        (["train", "--method", "dino", "--epochs"], "--epochs: expected one argument"),
        (["train", "--method", "dino", "--precision", "fp8"], "--precision: .*'fp8'"),
        (["train", "--method", "dino", "--entropy", "maybe"], "--entropy: 'maybe'"),
        (["train"], "--method: .*byol, cmc, deepcluster, dino"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_value_is_refused_by_flag(arguments, names, capsys, tmp_path, monkeypatch):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "EMPTY" / "metrics.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    line = _error(capsys, arguments)
    assert re.search(names, line), line


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(_COMMANDS.keys() - {"doctor"}))
def test_missing_package_is_named_with_the_way_to_install_it(command):
    """As after ``pip install fasttrain`` without an extra."""
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_PYDANTIC, command], cwd=_ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert done.stdout in ("", _LOADING)
    (line,) = done.stderr.splitlines()
    assert f"fasttrain {command} needs pydantic" in line
    assert "pip install 'fasttrain[train]'" in line


def _broken_yaml(folder):
    (folder / "broken.yaml").write_text("lr: [1, 2\nepochs: }")
    return ["--config", folder / "broken.yaml"]


def _text_as_images(folder):
    for i in range(12):
        (folder / f"{i}.jpg").write_text("no image")
    return ["--data_path", folder]


@pytest.mark.parametrize(
    ("more", "names"),
    [
        (["--method", "simclar"], "--method: 'simclar'.*simclr"),
        (["--recipe", "imagnet"], "--recipe: 'imagnet'.*imagenet"),
        (["--arch", "resnet181"], "'resnet181'.*resnet18"),
        (["--arch", "vit_tiny", "--patch_size", "5"], "--patch_size: .*32 pixels.*5"),
        (["--data_path", "/no/such/folder"], "/no/such/folder"),
        (lambda folder: ["--data_path", folder], "no image"),
        (_text_as_images, r"1\d of 1\d images.*0.1.*.jpg"),
        (["--batch_size_per_gpu", "64"], "64.*32"),
        (["--gradient_accumulation_steps", "5"], "--batch_size_per_gpu: .*40.*32"),
        (["--optimizer", "adam"], "'adam'.*adamw"),
        (["--zero_stage", "1", "--precision", "fp16"], "--precision.*fp16.*--zero_stage"),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml: "),
        (_broken_yaml, "--config .*broken.yaml: "),
        (["--output_dir", "/dev/null/x"], "--output_dir /dev/null/x: "),
        (["--output_dir", "/proc/self"], "--output_dir /proc/self: "),
        (["--resume", "/no/such/run"], "--resume.*/no/such/run"),
        (["--data_path", "/no/such/*.tar"], r"/no/such/\*.tar"),
        (["--init_from", "/no/such/file"], "/no/such/file"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else getattr(value, "__name__", ""),
)
def test_training_that_cannot_start_is_one_line(images, tmp_path, capsys, more, names):
    (tmp_path / "files").mkdir()
    options = more(tmp_path / "files") if callable(more) else more
    assert main(["train", *flags(images, tmp_path / "run", *options)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fasttrain: ")
    assert re.search(names, line), line


@pytest.mark.slow
def test_unknown_flag_from_the_shell_prints_one_line():
    program = (sys.executable, "-c", "import sys; from fasttrain.cli import main; sys.exit(main())")
    process = start(["train", "--method", "simclr", "--epoch", "3"], *program)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out == _LOADING
    assert "--epochs" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (["views", "--method", "dino", "--output", "~/views.png"], "views.png"),
        (["export", "--timm", "test_vit", "--format", "timm", "--output", "~/net.safetensors"], "net.safetensors"),
        (["plan", "--method", "simclr", "--recipe", "cifar", "--output", "~/plan.json"], "plan.json"),
    ],
)
def test_home_folder_is_expanded_in_outputs(arguments, written, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(arguments) == 0
    assert (tmp_path / written).is_file()


def test_first_line_is_printed_before_torch_is_imported():
    """A new user saw nothing for as long as the imports took."""
    code = "import sys; sys.modules['torch'] = None; from fasttrain.cli import main; main(['train', *sys.argv[1:]])"
    for arguments, expected in (("--method dino", _LOADING), ("--help", "")):
        out = subprocess.run([sys.executable, "-c", code, *arguments.split()], capture_output=True, text=True).stdout
        assert out == expected
