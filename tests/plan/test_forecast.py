"""From a configuration to a stage, a batch and hours; and one line where nothing fits."""

import re
from dataclasses import replace

import pytest

from fasttrain.errors import ConfigError
from fasttrain.plan.forecast import _accepts, _can_recompute, _choice, forecast, refusal
from fasttrain.plan.hardware import GIB, GPUS, Cluster
from fasttrain.plan.memory import Part

from .small import built, configured

_NODE = Cluster(GPUS["h100"], 1, 4, reserve=0)


def _on(memory, world=4):
    """GPUs with so many bytes."""
    return Cluster(replace(GPUS["h100"], memory=memory), 1, world, reserve=0)


@pytest.fixture(scope="module")
def plain():
    return forecast(configured("dino", arch="conv_small"), _NODE, 6400)


def test_steps_images_and_hours(plain):
    t = plain.config.train
    assert plain.global_batch == 32
    assert plain.steps == t.epochs * 200
    stage = plain.stages[1]
    assert plain.hours(stage) == pytest.approx(plain.steps * stage.time.total / 3600)
    assert [stage.stage for stage in plain.stages] == [0, 1, 2, 3]
    assert plain.chosen is plain.stages[0]


def test_the_largest_batch_fits_and_few_more_do_not(plain):
    cluster = _on(plain.stages[0].bytes * 3)
    largest = forecast(plain.config, cluster, 64000).stages[0].largest_batch
    assert 8 < largest < 200
    for batch, fits in ((largest, True), (largest + 1 + largest // 50, False)):
        found = forecast(configured("dino", arch="conv_small", batch_size_per_gpu=batch), cluster, 64000)
        assert found.fits(found.stages[0]) == fits


@pytest.mark.parametrize("method", ["moco", "infomin", "swav"])
def test_a_queue_holds_whole_batches(method):
    """SwAV's was not looked at: batches were recommended that the training refused."""
    config = configured(method, arch="conv_small", queue_length=480)
    accepted = [batch for batch in range(1, 31) if _accepts(config, batch * 4)]
    assert accepted == [1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 24, 30]


def test_a_batch_that_no_queue_would_take_is_not_recommended():
    config = configured("swav", arch="conv_small", queue_length=480)
    largest = forecast(config, _on(10 * GIB), 400).stages[0].largest_batch  # 100 images a GPU would fit
    assert largest == 60


def test_methods_without_a_queue_take_any_batch():
    assert _accepts(configured("dino"), 7)
    assert _accepts(configured("swav", queue_length=0), 7)


@pytest.mark.parametrize("method", ["byol", "simsiam", "mocov3"])
def test_heads_with_batchnorm_are_traced_with_two_images_at_least(method):
    """Where hardly anything fits, the second trace had one image, and ended in a traceback."""
    config = configured(method, arch="conv_small")
    found = forecast(config, _on(1), 6400)
    assert [stage.largest_batch for stage in found.stages] == [0, 0, 0, 0]
    with pytest.raises(ConfigError, match=r"one image a GPU cannot be planned \(Expected more .*; raise --batch_size"):
        forecast(configured(method, arch="conv_small", batch_size_per_gpu=1), _NODE, 6400)


def _needing(plain, gibs, batches=(0, 0, 0, 0), asked=None, world=4, overlap=None):
    """The forecast of a run whose stages need so much, on GPUs of 10 GiB; and what it chooses."""
    sizes = zip(plain.stages, gibs, batches, strict=True)
    stages = tuple(replace(s, parts=(Part("all", int(n * GIB), 0),), largest_batch=b) for s, n, b in sizes)
    config = replace(plain.config, train=replace(plain.config.train, zero_stage=asked, overlap_comm=overlap))
    cluster = _on(10 * GIB, world)
    return replace(plain, config=config, cluster=cluster, stages=stages, chosen=_choice(stages, config.train, cluster))


@pytest.mark.parametrize(
    ("gibs", "asked", "world", "chosen"),
    [
        ((9, 8, 7, 6), None, 4, 0),
        ((12, 11, 10, 6), None, 4, 2),
        ((12, 9, 11, 6), 3, 4, 3),
        ((9, 9, 9, 11), 3, 4, None),
        ((11, 9, 9, 9), None, 1, None),  # the engine shards nothing on one GPU unless it is asked to
        ((11, 9, 9, 9), 1, 1, 1),
        ((11, 11, 11, 11), None, 4, None),
    ],
)
def test_the_stage_asked_for_or_the_lowest_that_fits(plain, gibs, asked, world, chosen):
    found = _needing(plain, gibs, asked=asked, world=world).chosen
    assert (None if found is None else found.stage) == chosen


def test_what_only_zero_has_is_not_looked_for_at_stage_0(plain):
    for world in (1, 4):
        assert _needing(plain, (9, 9, 9, 9), world=world, overlap=True).chosen.stage == 1


@pytest.mark.parametrize(
    ("gibs", "batches", "asked", "helps"),
    [
        ((12, 11, 9, 8), (0, 0, 9, 9), 0, "12.0 GiB at --zero_stage 0, and h100 has 10.0 to give; --zero_stage 2 fits"),
        ((40, 30, 20, 15), (1, 2, 3, 5), None, "at --zero_stage 3, .*; --zero_stage 3 --batch_size_per_gpu 5 fits"),
        ((40, 30, 20, 15), (0, 0, 0, 0), None, "take more GPUs .--nodes., a GPU with more memory, or a smaller --arch"),
    ],
)
def test_too_little_memory_is_one_line_with_what_would_help(plain, gibs, batches, asked, helps):
    found = _needing(plain, gibs, batches, asked)
    assert re.fullmatch(f"conv_small with 8 images a GPU needs .*{helps}", refusal(found))
    also = refusal(replace(found, can_recompute=True)).removeprefix(refusal(found))
    assert also == ("" if asked == 0 else "; --activation_checkpointing takes less")


def test_vits_can_recompute_their_blocks_if_they_do_not_yet():
    values = {"arch": "vit_tiny", "patch_size": 8}
    assert _can_recompute(built(configured("simclr", **values)).backbone)
    assert not _can_recompute(built(configured("simclr", arch="conv_small")).backbone)


@pytest.mark.parametrize(
    ("values", "images", "message"),
    [
        ({}, 31, r"a batch of 32 images is larger than the data \(31\); lower --batch_size_per_gpu or --nodes"),
        ({"gradient_accumulation_steps": 2}, 63, r"a batch of 64 images is larger than the data \(63\)"),
        ({"precision": "fp16", "zero_stage": 2}, 6400, "--precision fp16 is for --zero_stage 0 only"),
    ],
)
def test_what_cannot_be_run_is_refused(values, images, message):
    with pytest.raises(ConfigError, match=message):
        forecast(configured("dino", arch="conv_small", **values), _NODE, images)


def test_a_queue_that_does_not_fit_the_ranks_is_refused():
    with pytest.raises(ConfigError, match="--queue_length 64 is not a multiple of the batch, 24 on all ranks"):
        forecast(configured("moco", arch="conv_small"), Cluster(GPUS["h100"], 1, 3), 6400)


def test_fp16_stays_at_stage_0():
    found = forecast(configured("simclr", arch="conv_small", precision="fp16"), _NODE, 6400)
    assert [stage.stage for stage in found.stages] == [0]
    assert found.chosen is found.stages[0]


def test_one_gpu_stays_at_stage_0_and_sends_nothing():
    config = configured("simclr", arch="conv_small")
    found = forecast(config, _on(100 * GIB, world=1), 6400)
    assert [stage.traffic for stage in found.stages] == [()] * 4
    assert found.chosen is found.stages[0]
