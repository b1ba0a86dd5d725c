"""The paper's binary test on real digits (arXiv 2307.10907, figure 2): DINO without centring, base and twin.
``bench/evidence/collapse.py`` is the same at full length.
"""

import json

import pytest

from fasttrain.run import main

_FLAGS = "--method dino --no_centering --out_dim 256 --use_bn_at_bottleneck false --momentum_teacher 0.9"
_FLAGS += " --warmup_epochs 1 --epochs 4 --knn_every 0"


@pytest.fixture(scope="module")
def summaries(tmp_path_factory):
    """What base and twin reach with the same flags."""
    found = []
    for twin in ([], ["--entropy"]):
        folder = tmp_path_factory.mktemp("run")
        assert main([*_FLAGS.split(), *twin, "--output_dir", str(folder)]) == 0
        found.append(json.loads((folder / "summary.json").read_text()))
    return found


def test_without_centring_dino_forgets_what_an_untrained_network_knows(summaries):
    base, _ = summaries
    assert base["entropy"] < 0.2 * base["entropy_max"]
    assert base["knn_top1"] < base["knn_top1_untrained"]


def test_without_centring_its_twin_keeps_its_entropy_and_learns(summaries):
    base, twin = summaries
    assert twin["entropy"] > 0.8 * twin["entropy_max"]
    assert twin["information"] > base["information"] + 1
    assert twin["knn_top1"] > max(twin["knn_top1_untrained"] + 0.01, base["knn_top1"] + 0.05)
    assert not twin["collapsed"]
