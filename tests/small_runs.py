"""A data set and flags so small that a whole run takes a fraction of a second."""

import json

import numpy as np
from PIL import Image

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
    given = {"method": method, **SMALL, "data_path": data, "output_dir": output}
    return [str(part) for name, value in given.items() for part in (f"--{name}", value)] + [str(part) for part in more]


def lines(path):
    """The objects of a file with one JSON object a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]
