"""What cannot be used is one line and status 2, before anything is trained."""

import re
import sys

import pytest

from fasttrain.run import main
from tests.small_runs import flags, start

pytestmark = pytest.mark.usefixtures("one_thread")


def _bad_yaml(folder):
    (folder / "broken.yaml").write_text("lr: [1, 2\nepochs: }")
    return ["--config", folder / "broken.yaml"]


def _text_as_images(folder):
    for i in range(12):
        (folder / f"{i}.jpg").write_text("no image")
    return ["--data_path", folder]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batchsize_per_gpu", "8"], "argument --batchsize_per_gpu is unknown; did you mean --batch_size_per_gpu?"),
        (["--temperatur=0.3"], "argument --temperatur is unknown; did you mean --temperature?"),
        (["--no-such-thing-at-all"], "argument --no_such_thing_at_all is unknown; --help lists them all"),
        (["--epochs", "three"], "argument --epochs: invalid int value: 'three'"),
        (["--epochs"], "argument --epochs: expected one argument"),
        (["--precision", "fp8"], "--precision: input should be 'auto', 'fp32', 'bf16' or 'fp16', got 'fp8'"),
        (["--entropy", "maybe"], "argument --entropy: 'maybe' is neither true nor false"),
        (["--method", "simclar"], "method 'simclar' is unknown; choose one of .*simclr"),
        (["--recipe", "imagnet"], "recipe 'imagnet' is unknown for simclr; choose one of .*imagenet"),
        (["--arch", "resnet181"], "network 'resnet181' is unknown; did you mean resnet18 "),
        (["--arch", "vit_tiny", "--patch_size", "5"], "patch_size 5 does not divide the image of 32 pixels"),
        (["--data_path", "/no/such/folder"], "/no/such/folder: no such folder; check the data path"),
        (lambda folder: ["--data_path", folder], "no image found; looked for files ending in .jpg"),
        (_text_as_images, r"1\d of 1\d images cannot be read, more than .* 0.1 allowed .*.jpg: not an image"),
        (["--batch_size_per_gpu", "64"], "a batch of 64 images .* is larger than the data, 32 images; use a smaller"),
        (["--gradient_accumulation_steps", "5"], "a batch of 40 images is larger than the data .32.; lower"),
        (["--optimizer", "adam"], "optimizer 'adam' is unknown; did you mean adamw?"),
        (
            ["--zero_stage", "1", "--precision", "fp16"],
            "--precision fp16 cannot be used with --zero_stage 1, .*; use --precision bf16 or",
        ),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml cannot be read: No such file or directory"),
        (_bad_yaml, "--config .*broken.yaml is not YAML: "),
        (["--output_dir", "/dev/null/x"], "--output_dir /dev/null/x cannot be made: "),
        (["--resume", "/no/such/run"], "--resume /no/such/run: no checkpoint there; pass a run's folder"),
        (["--data_path", "/no/such/*.tar"], "/no/such/.*.tar: no file matches; check the pattern"),
        (["--num_workers", "-1"], "--num_workers must be at least 0, got -1"),
        (["--max_skipped_steps", "0"], "--max_skipped_steps must be at least 1, got 0"),
        (["--watchdog_minutes", "-1"], "--watchdog_minutes must be at least 0, got -1.0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else getattr(value, "__name__", ""),
)
def test_what_cannot_be_used_is_one_line_and_status_2(images, tmp_path, capsys, more, message):
    (tmp_path / "given").mkdir()
    given = more(tmp_path / "given") if callable(more) else more
    assert main(flags(images, tmp_path / "run", *given)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fasttrain: ")
    assert re.search(message, line), line


def test_a_method_is_needed(capsys):
    assert main([]) == 2
    assert "--method is missing; choose one of byol, cmc, deepcluster, dino" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["/proc/self", "/sys/kernel"])
def test_a_folder_that_cannot_be_written_to_is_known_before_training(images, capsys, folder):
    assert main(flags(images, folder)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"fasttrain: --output_dir {folder} cannot be written to: .*; choose another", line), line


def test_a_wrong_flag_from_the_shell():
    program = (sys.executable, "-c", "import sys; from fasttrain.cli import main; sys.exit(main())")
    process = start(["train", "--method", "simclr", "--epoch", "3"], *program)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out == ""
    assert err == "fasttrain: argument --epoch is unknown; did you mean --epochs?\n"
