"""Train, plan, evaluate and export the smallest network of every family of timm, with random weights.

    python -m bench.evidence.networks              # an hour on two cores; skips families with a result
    python -m bench.evidence.networks vgg tresnet  # these families again
    python -m bench.evidence.networks --show       # print the failures in the result

Every family must work, or be refused with one clear line. ``bench/results/evidence/networks.json`` has the result.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from bench import RESULTS

RESULT = RESULTS / "evidence" / "networks.json"
_SIZES = (128, 224)
_FORMATS = {"timm": ".safetensors", "hf": "", "safetensors": ".safetensors"}
Row = dict[str, Any]


def smallest() -> dict[str, Row]:
    """Return each family's network with the fewest parameters, and the side of its images in pixels.

    The side is the network's own if that is fixed. Otherwise it is the first of 128, 224 and its own that it accepts.
    """
    import timm
    import torch

    from fasttrain.models.architectures import has_one_size

    rows = {}
    for family in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=family):
            with torch.device("meta"):
                sizes[name] = sum(p.numel() for p in timm.create_model(name, num_classes=0).parameters())
        name = min(sizes, key=lambda name: (sizes[name], name))
        own = timm.get_pretrained_cfg(name).input_size[1]
        size = own if has_one_size(name) else next((size for size in _SIZES if accepts(name, size)), own)
        rows[family] = {"arch": name, "size": size}
    return rows


def accepts(name: str, size: int) -> bool:
    """Return whether a network can be built for images of this size and gives features."""
    import torch

    from fasttrain.models.architectures import check_crops, create_backbone

    try:
        with torch.device("meta"):
            check_crops(create_backbone(name, img_size=size), [size])
        return True
    except ValueError:
        return False


def measure(name: str, size: int, images: str) -> Row:
    """Return, for each command, ``ok`` or its exit status and the last line of its error."""
    network = ("--arch", name, "--global_crops_size", str(size), "--batch_size_per_gpu", "2", "--recipe", "imagenet")
    train = (*network, "--method", "simclr", "--knn_every", "0", "--num_workers", "1", "--epochs", "1")
    small = ("--hidden_dim", "32", "--out_dim", "8", "--limit_steps", "2")
    knn = ("--metrics", "knn", "--knn_k", "1", "--num_workers", "1", "--cache", "none", "--batch_size_per_gpu", "4")
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/run"
        row = {
            "train": outcome("train", *train, *small, "--data_path", images, "--output_dir", run),
            "plan": outcome("plan", *network, "--method", "simclr", "--gpus_per_node", "1", "--images", "64"),
            "eval": outcome("eval", run, *knn),
            "eval --timm": outcome("eval", "--timm", name, "--size", str(size), "--data_path", images, *knn),
        }
        for form, suffix in _FORMATS.items():
            row[f"export {form}"] = outcome("export", run, "--format", form, "--output", f"{folder}/{form}{suffix}")
    return row


def outcome(*command: str) -> str:
    """Return ``ok``, or the exit status and the last line of stderr of a command of fasttrain."""
    from fasttrain.cli import main

    stderr = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(stderr):
        try:
            status = main(list(command))
        except Exception as error:  # a crash is a result here
            return f"1: {type(error).__name__}: {error}".splitlines()[0]
    return "ok" if status == 0 else f"{status}: {(stderr.getvalue().strip().splitlines() or [''])[-1]}"


def in_process(*arguments: str) -> Row:
    """Return :func:`measure` of a process of its own, so that a crash ends no other measurement."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=lambda: sender.send(measure(*arguments)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return {"train": f"the process ended with status {process.exitcode}"}


def failures(row: Row) -> list[str]:
    """Return the commands that failed and their errors."""
    return [f"{key}: {value}" for key, value in row.items() if key not in ("arch", "size") and value != "ok"]


def main() -> None:
    """Measure the families without a result, and write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--show", action="store_true", help="print the failures; measure nothing")
    options = parser.parse_args()
    rows: dict[str, Row] = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    if not options.show:
        from tests.small_runs import write_images

        rows = rows or smallest()
        with tempfile.TemporaryDirectory() as images:
            write_images(Path(images), train=4, val=4)
            for family in options.families or [family for family, row in rows.items() if "train" not in row]:
                network = {key: rows[family][key] for key in ("arch", "size")}
                rows[family] = network | in_process(*network.values(), images)
                RESULT.write_text(json.dumps(rows, indent=1) + "\n")
                print(family, *failures(rows[family]), sep="\n  ", flush=True)
    failed = {family: lines for family, row in rows.items() if (lines := failures(row))}
    for family, lines in failed.items():
        print(family, rows[family]["arch"], *lines, sep="\n  ")
    measured = sum("train" in row for row in rows.values())
    print(f"{measured - len(failed)} of {measured} measured families work, {len(rows) - measured} are not measured")


if __name__ == "__main__":
    main()
