"""Test that a campaign resumes, trains nothing twice, and does not run next to another."""

import json

import pytest

from bench.evidence import campaign
from bench.evidence.campaign import Run, knn_of, run_all, summary, table

RUNS = [Run("dino", 0, ("--epochs", "3")), Run("dino+er", 0), Run("dino", 1, ("--epochs", "3"))]


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Return the list of trained runs. Their k-NN is a tenth of the seed."""
    runs = []

    def train(run):
        if run.name == "fails":
            raise SystemExit("ended with status 1")
        runs.append(run)
        return {"run": run.name, "seed": run.seed, "flags": list(run.flags), "knn_top1": run.seed / 10}

    monkeypatch.setattr(campaign, "_train", train)
    monkeypatch.setattr(campaign.tempfile, "gettempdir", lambda: str(tmp_path))
    return runs


def test_command_has_method_twin_seed_flags_and_data():
    command = Run("swav+er small", 4, ("--epochs", "2"), "/images").command
    assert command[1].endswith("fasttrain/run.py")
    assert " ".join(command[2:]) == "--method swav --seed 4 --entropy --epochs 2 --data_path /images"
    assert "--entropy" not in Run("swav small", 4).command


def test_run_all_skips_runs_with_a_result(trained, tmp_path):
    """A run that fails keeps the results before it. The folder of the images does not matter."""
    path = tmp_path / "results" / "r.json"
    with pytest.raises(SystemExit):
        run_all([*RUNS[:2], Run("fails", 0)], path)
    assert trained == RUNS[:2]
    assert len(json.loads(path.read_text())["runs"]) == 2
    assert len(run_all(RUNS, path)) == 3
    run_all([Run("dino", 0, ("--epochs", "3"), data="/elsewhere")], path)
    assert trained == RUNS


def test_run_all_replaces_a_row_with_other_flags(trained, tmp_path):
    path = tmp_path / "r.json"
    run_all(RUNS[:1], path)
    assert run_all(RUNS[:1], path, show=True) != []
    assert run_all([Run("dino", 0, ("--epochs", "9"))], path)[0]["flags"] == ["--epochs", "9"]
    assert run_all(RUNS[:1], path, show=True) == []


def test_run_all_refuses_a_second_campaign(trained, tmp_path):
    with campaign.alone(), pytest.raises(SystemExit, match="another campaign"):
        run_all(RUNS, tmp_path / "r.json")


def test_summary_is_over_seeds(trained, tmp_path):
    rows = run_all(RUNS, tmp_path / "r.json")
    assert summary(rows, "dino") == (0.05, 0.05, 2)
    assert summary(rows, "nothing")[2] == 0
    assert knn_of(rows, "dino") == "0.050 +- 0.050 (2)"
    assert knn_of(rows, "dino+er") == "0.000"
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n|---|---:|\n| x | 1 |"
