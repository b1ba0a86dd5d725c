"""Test the newest DeepSpeed, which pyproject.toml may exclude, in an environment over this one.

python -m bench.scale.newest_deepspeed              # or a version: python -m bench.scale.newest_deepspeed 0.20.1

Run it by hand before the upper bound is raised. The tests have one case per private name of DeepSpeed, so the first
failure names the first difference. They take about 10 minutes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile

from bench import ROOT

_TESTS = ("tests/engine", "tests/checkpoint", "tests/training/test_guard.py", "tests/distributed/test_two_ranks.py")


def main() -> None:
    """Install DeepSpeed alone into a temporary folder, and test with that folder first on the path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", nargs="?", help="default: the newest on the package index")
    version = parser.parse_args().version
    package = f"deepspeed=={version}" if version else "deepspeed"
    with tempfile.TemporaryDirectory() as folder:
        install = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", folder, package]
        subprocess.run([sys.executable, *install], check=True)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([folder, str(ROOT)]), "OMP_NUM_THREADS": "1"}
        name = "import importlib.metadata as m; print('deepspeed', m.version('deepspeed'))"
        subprocess.run([sys.executable, "-c", name], check=True, env=environment)
        tests = [sys.executable, "-m", "pytest", "-x", "-m", "slow or not slow", *_TESTS]
        raise SystemExit(subprocess.run(tests, cwd=ROOT, env=environment).returncode)


if __name__ == "__main__":
    main()
