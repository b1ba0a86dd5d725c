"""Run lightly's own unit tests with fasttrain's classes instead of lightly's, and count the passed tests.

    git clone https://github.com/lightly-ai/lightly && python -m bench.peers.lightly_suite lightly

The tests of NTXentLoss, DINOLoss, SwaVLoss, NegativeCosineSimilarity and MemoryBankModule run twice: on the installed
lightly and on ours. A test that fails on both belongs to another version of lightly.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import RESULTS

_FILES = [f"loss/test_{name}.py" for name in ("ntx_ent_loss", "dino_loss", "swav_loss", "negative_cosine_similarity")]
_FILES += ["models/modules/test_memory_bank.py"]
_OURS = """
import importlib
from fasttrain import losses
for name, places in {
    "NTXentLoss": ("lightly.loss", "lightly.loss.ntx_ent_loss"),
    "DINOLoss": ("lightly.loss", "lightly.loss.dino_loss"),
    "SwaVLoss": ("lightly.loss", "lightly.loss.swav_loss"),
    "NegativeCosineSimilarity": ("lightly.loss", "lightly.loss.negative_cosine_similarity"),
    "MemoryBankModule": ("lightly.models.modules", "lightly.models.modules.memory_bank"),
}.items():
    for place in places:
        setattr(importlib.import_module(place), name, getattr(losses, name))
"""


def outcomes(folder: Path, *options: str) -> dict[str, str]:
    """Return the outcome of each test by its name."""
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *options]
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, *(f"tests/{name}" for name in _FILES)], cwd=folder, env=environment, capture_output=True, text=True
    )
    outcomes_by_line = re.findall(r"^(PASSED|FAILED|ERROR) (\S+)", run.stdout, flags=re.M)
    if not outcomes_by_line:
        raise SystemExit(run.stdout[-2000:] + run.stderr[-2000:])
    return {name: outcome for outcome, name in outcomes_by_line}


def main() -> None:
    """Run both sides, and list the tests that pass on only one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a clone of lightly")
    source = parser.parse_args().source
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(source / "tests", folder / "tests")
        (folder / "ours.py").write_text(_OURS)
        theirs, ours = outcomes(folder), outcomes(folder, "-p", "ours")
    lost = sorted(test for test, outcome in theirs.items() if outcome == "PASSED" and ours.get(test) != "PASSED")
    won = sorted(test for test, outcome in ours.items() if outcome == "PASSED" and theirs.get(test) != "PASSED")
    counts = {
        side: {"run": len(results), "passed": sum(outcome == "PASSED" for outcome in results.values())}
        for side, results in (("lightly", theirs), ("fasttrain", ours))
    }
    result = counts | {"pass on lightly alone": lost, "pass on fasttrain alone": won}
    (RESULTS / "lightly-suite.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
