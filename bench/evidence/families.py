"""Draw entropy and reconstruction of one method per family over the demo, for its own objective and its twin.

python -m bench.evidence.families        # six trainings, one after another; resumes an interrupted campaign
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
_COLUMNS = ("step", "entropy", "entropy_max", "reconstruction")
_RESULT = EVIDENCE / "families.json"


def train(run: Run) -> dict[str, list[float]]:
    """Return the values that the run logged every ``_LOGGED`` steps."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*run.command, "--output_dir", folder], cwd=ROOT, check=True)
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return {key: [line[key] for line in lines] for key in _COLUMNS}


def main() -> None:
    """Train the missing runs and draw the picture."""
    options = parser(__doc__, seeds=(0,)).parse_args()
    from bench.evidence.picture import curves, twins  # they need matplotlib, unlike the table

    results: dict[str, Any] = json.loads(_RESULT.read_text()) if _RESULT.is_file() else {}
    if not options.show:
        with alone():
            for name in [method + twin for method in _FAMILIES.values() for twin in ("", "+er")]:
                if name not in results:
                    flags = ("--knn_every", "1000", "--log_every", str(_LOGGED))
                    results[name] = train(Run(name, options.seeds[0], flags))
                    _RESULT.write_text(json.dumps(results) + "\n")
    curves(results, _FAMILIES, DOCS / "families.svg")
    twins(results, "dino", "DINO", DOCS / "bound.svg")


if __name__ == "__main__":
    main()
