"""Entropy and reconstruction of a method of each family over a run of the demo, with its own objective and its twin's.

python -m bench.evidence.families        # six trainings, one after another; goes on where it was interrupted
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from bench import ROOT
from bench.evidence.campaign import DOCS, EVIDENCE, Run, alone, parser

_FAMILIES = {"contrastive": "simclr", "clustering": "swav", "distillation": "dino"}
_LOGGED = 15
_KEPT = ("step", "entropy", "entropy_max", "reconstruction")
_RESULT = EVIDENCE / "families.json"


def train(run: Run) -> dict[str, list[float]]:
    """What the run logged, every ``_LOGGED`` steps."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*run.command, "--output_dir", folder], cwd=ROOT, check=True)
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return {key: [line[key] for line in lines] for key in _KEPT}


def main() -> None:
    """Train what is missing and draw all."""
    options = parser(__doc__, seeds=(0,)).parse_args()
    from bench.evidence.picture import curves  # needs matplotlib, unlike the table

    found: dict[str, Any] = json.loads(_RESULT.read_text()) if _RESULT.is_file() else {}
    if not options.show:
        with alone():
            for name in [method + twin for method in _FAMILIES.values() for twin in ("", "+er")]:
                if name not in found:
                    flags = ("--knn_every", "0", "--log_every", str(_LOGGED))
                    found[name] = train(Run(name, options.seeds[0], flags))
                    _RESULT.write_text(json.dumps(found) + "\n")
    curves(found, _FAMILIES, DOCS / "families.svg")


if __name__ == "__main__":
    main()
