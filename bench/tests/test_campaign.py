"""A campaign goes on where it was interrupted, makes nothing twice, and does not run beside another."""

import json

import pytest

from bench.evidence import campaign
from bench.evidence.campaign import Run, knn_of, run_all, summary, table


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """The runs that were made, in order; k-NN is the seed by ten."""
    made = []

    def train(run):
        made.append(run)
        return {"run": run.name, "seed": run.seed, "flags": list(run.flags), "knn_top1": run.seed / 10}

    monkeypatch.setattr(campaign, "_train", train)
    monkeypatch.setattr(campaign.tempfile, "gettempdir", lambda: str(tmp_path))
    return made


RUNS = [Run("dino", 0, ("--epochs", "3")), Run("dino+er", 0), Run("dino", 1, ("--epochs", "3"))]


def test_a_command_says_method_twin_seed_flags_and_data():
    command = Run("swav+er small", 4, ("--epochs", "2"), "/images").command
    assert command[1].endswith("fasttrain/run.py")
    assert " ".join(command[2:]) == "--method swav --seed 4 --entropy --epochs 2 --data_path /images"
    assert "--entropy" not in Run("swav small", 4).command


def test_what_is_done_is_not_done_again(trained, tmp_path):
    path = tmp_path / "results" / "r.json"
    assert len(run_all(RUNS[:2], path)) == 2
    assert trained == RUNS[:2]
    assert len(run_all(RUNS, path)) == 3
    assert trained == RUNS
    assert len(json.loads(path.read_text())["runs"]) == 3


def test_a_run_of_another_kind_is_found_again_too(trained, tmp_path):
    class Special(Run):
        pass

    for _ in range(2):
        rows = run_all([Special("dino special", 0)], tmp_path / "r.json")
    assert len(trained) == len(rows) == 1


def test_a_campaign_that_breaks_keeps_what_it_had(trained, tmp_path, monkeypatch):
    path, train = tmp_path / "r.json", campaign._train

    def breaks(run):
        if run.seed:
            raise SystemExit("ended with status 1")
        return train(run)

    monkeypatch.setattr(campaign, "_train", breaks)
    with pytest.raises(SystemExit):
        run_all(RUNS, path)
    assert [row["run"] for row in campaign.read(path)] == ["dino", "dino+er"]


def test_other_flags_replace_a_row(trained, tmp_path):
    path = tmp_path / "r.json"
    run_all(RUNS[:1], path)
    changed = [Run("dino", 0, ("--epochs", "9"))]
    assert run_all(RUNS[:1], path, show=True) != []
    assert run_all(changed, path)[0]["flags"] == ["--epochs", "9"]
    assert run_all(RUNS[:1], path, show=True) == []


def test_where_the_images_lie_does_not_matter(trained, tmp_path):
    path = tmp_path / "r.json"
    run_all([Run("dino", 0, data="/here")], path)
    run_all([Run("dino", 0, data="/there")], path)
    assert len(trained) == 1


def test_two_campaigns_do_not_run_at_once(trained, tmp_path):
    with campaign.alone(), pytest.raises(SystemExit, match="another campaign is training"):
        run_all(RUNS, tmp_path / "r.json")


def test_summaries_are_over_seeds(trained, tmp_path):
    rows = run_all(RUNS, tmp_path / "r.json")
    assert summary(rows, "dino") == (0.05, 0.05, 2)
    assert summary(rows, "nothing")[2] == 0
    assert knn_of(rows, "dino") == "0.050 +- 0.050 (2)"
    assert knn_of(rows, "dino+er") == "0.000"
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n|---|---:|\n| x | 1 |"
