"""Measure the cost of checkpoints: the seconds that a step waits for one, relative to 100 steps of the demo.

python -m bench.scale.saving
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from bench import RESULTS

_EVERY, _STEPS = 100, 600
_FLAGS = ["--method", "dino", "--entropy", "--knn_every", "0", "--saveckp_freq_steps", str(_EVERY)]


def main() -> None:
    """Train the demo in this process, with a clock around every store."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    from fasttrain.distributed.world import prepare_environment

    prepare_environment()
    from fasttrain.checkpoint import store
    from fasttrain.run import main as train

    publish, seconds = store.publish, []

    def timed(*arguments: object, **options: object) -> None:
        started = time.perf_counter()
        publish(*arguments, **options)
        seconds.append(time.perf_counter() - started)

    store.publish = timed
    with tempfile.TemporaryDirectory() as output:
        if status := train([*_FLAGS, "--limit_steps", str(_STEPS), "--output_dir", output]):
            raise SystemExit(status)
        total = json.loads(Path(output, "summary.json").read_text())["seconds"]
        newest = Path(output, "checkpoints", Path(output, "checkpoints/latest").read_text().strip())
        size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    result = {
        "every_steps": _EVERY,
        "steps": _STEPS,
        "checkpoints": len(seconds),
        "checkpoint_bytes": size,
        "seconds": total,
        "seconds_saving": sum(seconds),
        "seconds_a_checkpoint_median": statistics.median(seconds),
        "overhead": sum(seconds) / (total - sum(seconds)),
    }
    path = RESULTS / "saving.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
