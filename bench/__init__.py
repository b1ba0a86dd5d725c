"""Benchmarks and campaigns: one folder per subject, one command per result."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
"""The root of the repository. Commands are started here: ``python -m bench.SUBJECT.NAME``."""
RESULTS = ROOT / "bench" / "results"
"""Where commands write their JSON files."""
