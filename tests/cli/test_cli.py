"""The console script where the trainer's packages are missing, as after ``pip install fasttrain`` without an extra."""

import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_WITHOUT_PYDANTIC = "import sys; sys.modules['pydantic'] = None; from fasttrain.cli import main; sys.exit(main())"


@pytest.mark.parametrize(
    ("arguments", "who"),
    [
        (["train", "--method", "dino"], "the trainer"),
        (["plan", "--method", "dino"], "the plan"),
        (["eval", "run"], "evaluation"),
        (["export", "run"], "export"),
        (["report", "run"], "a report"),
    ],
)
def test_a_missing_package_is_one_line_that_says_what_to_install(arguments, who):
    command = [sys.executable, "-c", _WITHOUT_PYDANTIC, *arguments]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"fasttrain: {who} needs pydantic; type: pip install 'fasttrain[train]'\n"
