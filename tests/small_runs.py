"""A data set and flags so small that a whole run takes a fraction of a second."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fasttrain.training.records import Recorder

_ROOT = Path(__file__).parent.parent
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # left behind by runs in this process
_TIMED = {"images_per_s", "data_wait", "train_images_per_s", "train_data_wait"}
SMALL = {"recipe": "cifar", "batch_size_per_gpu": 8, "epochs": 2, "log_every": 1, "hidden_dim": 32, "out_dim": 8}


def write_images(root, train=32, val=8):
    """Noise of 32 x 32 pixels, JPEG and PNG, in train/ and val/ with two classes each."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            folder = root / split / ("cat", "dog")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:02d}.{'png' if i % 3 else 'jpg'}")
    return root


def flags(data, output, *more, method="simclr"):
    """A whole command line; what comes in ``more`` overrules the rest."""
    values = {"method": method, **SMALL, "data_path": data, "output_dir": output}
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)] + [str(part) for part in more]


def lines(path):
    """The objects of a file with one JSON object a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(run):
    """Every tensor of the newest checkpoint of a run, optimizer included, by its path in the file."""
    folder = run / "checkpoints"
    state = torch.load(
        folder / (folder / "latest").read_text() / "mp_rank_00_model_states.pt", weights_only=True, map_location="cpu"
    )
    actual = {}

    def collect(value, path):
        if isinstance(value, torch.Tensor):
            actual[path] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                collect(inner, f"{path}/{key}")

    for part in ("module", "optimizer"):
        collect(state[part], part)
    assert {path.split("/")[0] for path in actual} == {"module", "optimizer"}
    return actual


def assert_same_run(output, expected):
    """The same values step by step and epoch by epoch, and the same weights to the last bit."""
    for name in ("metrics.jsonl", "log.txt"):
        ours, theirs = (
            [{k: v for k, v in line.items() if k not in _TIMED} for line in lines(run / name)]
            for run in (output, expected)
        )
        assert ours == theirs
    ours, theirs = weights(output), weights(expected)
    assert ours.keys() == theirs.keys()
    assert [path for path in ours if not torch.equal(ours[path], theirs[path])] == []


def train_few_steps(data, output, *more, method="simclr"):
    """Train two steps in this process; the folder of the run."""
    from fasttrain.run import main

    short = ("--limit_steps", 2, "--num_workers", 1, "--recipe", "cifar", *more)
    assert main(flags(data, output, *short, method=method)) == 0
    return output


def start(arguments, *program):
    """The command in a process of its own, as a user starts it, or another program with these arguments."""
    environment = {k: v for k, v in os.environ.items() if k not in _LAUNCHER}
    environment |= {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    command = [*(program or (sys.executable, "fasttrain/run.py")), *arguments]
    return subprocess.Popen(
        command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@contextmanager
def when_logged(step, action):
    """Call a function after the line of each step."""
    write = Recorder.step

    def written(self, values):
        write(self, values)
        if values["step"] == step:
            action()

    Recorder.step = written
    try:
        yield
    finally:
        Recorder.step = write
