"""Methods with state of different kinds through the command: a resumed run equals the run in one go.

Every method's state is in ``state_dict`` (tests/methods), and a checkpoint restores it exactly (tests/checkpoint). So
one method per kind of state is enough here: a queue, memories with k-means, a twin with a teacher
and a centre, and masks with a third network.
"""

import json
import shutil

import pytest

from fasttrain.run import main
from tests.small_runs import assert_same_run, lines, write_images

# 32 images in batches of 8: two epochs are eight steps.
_SHARED = {"recipe": "cifar", "batch_size_per_gpu": 8, "epochs": 2, "log_every": 1, "knn_every": 0}
SETTINGS = {
    "deepcluster": {"nmb_prototypes": 6, "hidden_dim": 32, "out_dim": 8},
    "dino": {"hidden_dim": 32, "bottleneck_dim": 8, "out_dim": 64},
    "dinov2": {
        "arch": "vit_mini",
        "local_crops_number": 0,
        "head_n_prototypes": 64,
        "head_hidden_dim": 32,
        "ibot_head_n_prototypes": 64,
        "ibot_head_hidden_dim": 32,
        "gram_loss_weight": 1.0,
        "gram_update_epochs": 0.5,  # 2 steps: the Gram teacher lags behind the teacher at the checkpoint
    },
    "moco": {"out_dim": 8, "queue_length": 32, "bn_splits": 2},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "noise")


def _run(method, data, output, *more):
    arguments = {"method": method, **_SHARED, **SETTINGS[method], "data_path": data, "output_dir": output}
    return main(
        [str(part) for name, value in arguments.items() for part in (f"--{name}", value)] + [str(m) for m in more]
    )


@pytest.mark.parametrize(
    ("method", "twin"), [("moco", ()), ("deepcluster", ()), ("dino", ("--entropy",)), ("dinov2", ())]
)
def test_resumed_run_equals_the_run_in_one_go(data, tmp_path, method, twin):
    assert _run(method, data, tmp_path / "straight", *twin) == 0
    assert _run(method, data, tmp_path / "parts", *twin, "--limit_steps", 3) == 0
    assert _run(method, data, tmp_path / "parts", *twin) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "straight")
    summary = json.loads((tmp_path / "straight" / "summary.json").read_text())
    assert (summary["method"], summary["entropy_objective"], summary["steps"]) == (method, bool(twin), 8)
    for line in lines(tmp_path / "straight" / "metrics.jsonl"):
        assert line["entropy"] <= line["entropy_max"] + 1e-4
        assert 0 <= line["channel_std"] < 2
        assert 1 <= line["effective_rank"] <= 64
        assert (line["momentum"] is None) == (method == "deepcluster")


def test_collapse_is_reported_recorded_and_stops_on_request(data, tmp_path, capsys):
    # DINO without centring, with a sharp teacher that is the student itself.
    more = ["--no_centering", "--momentum_teacher", 0, "--momentum_teacher_end", 0, "--teacher_temp", 0.01]
    more += ["--freeze_last_layer", 0, "--warmup_epochs", 0, "--lr", 0.3, "--epochs", 12]
    assert _run("dino", data, tmp_path / "on", *more) == 0
    captured = capsys.readouterr()
    assert 1 <= captured.out.count("collapsing: ") <= 3  # reported again only after it had improved
    assert json.loads((tmp_path / "on" / "summary.json").read_text())["collapsed"] is True
    assert _run("dino", data, tmp_path / "stop", *more, "--stop_on_collapse") == 3
    err = capsys.readouterr().err
    assert err.startswith("fasttrain: collapsed: ")
    assert "--entropy" in err
    assert len(lines(tmp_path / "stop" / "metrics.jsonl")) < 48


def test_other_number_of_images_is_reported_on_resume(data, tmp_path, capsys):
    """The epoch jumped back in silence, and DeepCluster's memory was a size mismatch without a reason."""
    fewer = shutil.copytree(data, tmp_path / "images")
    for image in sorted((fewer / "train" / "cat").iterdir())[:8]:
        image.unlink()
    for method in ("moco", "deepcluster"):
        assert _run(method, data, tmp_path / method, "--limit_steps", 4) == 0
        capsys.readouterr()
        status = _run(method, fewer, tmp_path / method)
        out, err = capsys.readouterr()
        assert status == (0 if method == "moco" else 2)
        assert "24 images, 32 in the checkpoint" in out
        assert ("a row per image: the data had 32 images, 24 now" in err) == (method == "deepcluster")
