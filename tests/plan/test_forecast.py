"""A forecast chooses a stage, a batch and hours, or returns one line if nothing fits."""

from dataclasses import replace

import pytest

from fasttrain import methods
from fasttrain.errors import ConfigError
from fasttrain.plan.forecast import _accepts, _can_recompute, _choice, forecast, refusal
from fasttrain.plan.hardware import GIB, GPUS, Cluster
from fasttrain.plan.memory import Part
from fasttrain.plan.pauses import Pauses, evaluation_time, pauses
from fasttrain.plan.step_time import StepTime

from .small import built, configured

_NODE = Cluster(GPUS["h100"], 1, 4, reserve=0)


def _on(memory, world=4):
    """Return GPUs with this number of bytes."""
    return Cluster(replace(GPUS["h100"], memory=memory), 1, world, reserve=0)


@pytest.fixture(scope="module")
def plain():
    return forecast(configured("dino", arch="conv_small"), _NODE, 6400)


def test_forecast_has_steps_images_and_hours(plain):
    assert (plain.global_batch, plain.steps) == (32, plain.config.train.epochs * 200)
    stage = plain.stages[1]
    assert plain.hours(stage) == pytest.approx((plain.steps * stage.time.total + stage.pauses.total) / 3600)
    assert stage.pauses.evaluation > 0 < stage.pauses.checkpoints
    assert [stage.stage for stage in plain.stages] == [0, 1, 2, 3]
    assert plain.chosen is plain.stages[0]


@pytest.mark.slow
def test_largest_batch_fits_and_slightly_larger_ones_do_not(plain):
    cluster = _on(plain.stages[0].bytes * 3)
    largest = forecast(plain.config, cluster, 64000).stages[0].largest_batch
    assert 8 < largest < 200
    for batch, fits in ((largest, True), (largest + 1 + largest // 50, False)):
        config = configured("dino", arch="conv_small", batch_size_per_gpu=batch)
        prediction = forecast(config, cluster, 64000)
        assert prediction.fits(prediction.stages[0]) == fits


@pytest.mark.parametrize("method", ["moco", "infomin", "swav"])
def test_largest_batch_divides_the_queue(method):
    """The plan once recommended batches that SwAV refused."""
    config = configured(method, arch="conv_small", queue_length=480)
    accepted = [batch for batch in range(1, 31) if _accepts(config, batch * 4)]
    assert accepted == [1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 24, 30]
    assert all(_accepts(config, 7) for config in (configured("dino"), configured("swav", queue_length=0)))
    if method == "swav":  # 100 images per GPU would fit
        assert forecast(config, _on(10 * GIB), 400).stages[0].largest_batch == 60


@pytest.mark.parametrize("method", ["byol", "simsiam", "mocov3"])
def test_heads_with_batch_norm_are_traced_with_two_images(method):
    """If almost nothing fitted, the second trace had one image and ended in a traceback."""
    prediction = forecast(configured(method, arch="conv_small"), _on(1), 6400)
    assert [stage.largest_batch for stage in prediction.stages] == [0, 0, 0, 0]
    with pytest.raises(ConfigError, match="--batch_size_per_gpu: 1"):
        forecast(configured(method, arch="conv_small", batch_size_per_gpu=1), _NODE, 6400)


def _needing(plain, gibs, batches=(0, 0, 0, 0), stage=None, world=4, overlap=None):
    """Return a forecast whose stages need these GiB, on GPUs of 10 GiB."""
    sizes = zip(plain.stages, gibs, batches, strict=True)
    stages = tuple(replace(s, parts=(Part("all", int(n * GIB), 0),), largest_batch=b) for s, n, b in sizes)
    config = replace(plain.config, train=replace(plain.config.train, zero_stage=stage, overlap_comm=overlap))
    cluster = _on(10 * GIB, world)
    return replace(plain, config=config, cluster=cluster, stages=stages, chosen=_choice(stages, config.train, cluster))


@pytest.mark.parametrize(
    ("gibs", "options", "chosen"),
    [
        ((9, 8, 7, 6), {}, 0),
        ((12, 11, 10, 6), {}, 2),
        ((12, 9, 11, 6), {"stage": 3}, 3),
        ((9, 9, 9, 11), {"stage": 3}, None),
        ((11, 9, 9, 9), {"world": 1}, None),  # on one GPU, the engine shards only with --zero_stage
        ((11, 9, 9, 9), {"stage": 1, "world": 1}, 1),
        ((11, 11, 11, 11), {}, None),
        ((9, 9, 9, 9), {"overlap": True}, 1),  # stage 0 cannot overlap
        ((9, 9, 9, 9), {"overlap": True, "world": 1}, 1),
    ],
)
def test_chosen_stage_is_the_requested_or_the_lowest_of_equals(plain, gibs, options, chosen):
    stage = _needing(plain, gibs, **options).chosen
    assert (None if stage is None else stage.stage) == chosen


@pytest.mark.parametrize(("seconds", "chosen"), [((9.0, 9.0, 8.8, 20.0), 0), ((9.0, 7.0, 7.1, 5.0), 3)])
def test_chosen_stage_is_the_fastest(plain, seconds, chosen):
    times = [StepTime(s, 0.0, 0.0, 0.0, 0.0) for s in seconds]
    stages = [replace(s, parts=(), time=time) for s, time in zip(plain.stages, times, strict=True)]
    assert _choice(stages, plain.config.train, plain.cluster).stage == chosen


def test_pauses_count_evaluations_and_checkpoints():
    config = configured("dino", arch="conv_small", epochs=21, knn_every=10, saveckp_freq_steps=50)
    memory = (Part("teacher", 5, int(2e9)), Part("activations", 7, int(9e9)))
    between = pauses(3.0, memory, config, Cluster(GPUS["h100"], copy=1e9), steps=210)
    assert between == Pauses(evaluation=4 * 3.0, checkpoints=(21 + 4) * 2.0)
    none = replace(config, train=replace(config.train, knn_every=0))
    assert pauses(3.0, memory, none, _NODE, steps=210).evaluation == 0


def test_evaluation_time_follows_the_images_and_the_ranks():
    config = configured("dino", arch="conv_small", knn_train_images=300, knn_val_images=100)
    method = built(config)
    one, four = (evaluation_time(method, config, Cluster(GPUS["h100"], 1, world), 1000) for world in (1, 4))
    assert one == pytest.approx(4 * four)
    assert evaluation_time(method, config, Cluster(GPUS["h100"], 1, 1), 200) == pytest.approx(one * 300 / 400)


@pytest.mark.parametrize(
    ("gibs", "batches", "stage", "fix"),
    [
        ((12, 11, 9, 8), (0, 0, 9, 9), 0, "needs 12.0 GiB at --zero_stage 0, got 10.0 usable. Use --zero_stage 2."),
        ((40, 30, 20, 15), (1, 2, 3, 5), None, "Use --zero_stage 3 --batch_size_per_gpu 5."),
        ((40, 30, 20, 15), (0, 0, 0, 0), None, "smaller --arch."),
    ],
)
def test_refusal_names_the_memory_and_a_fix(plain, gibs, batches, stage, fix):
    prediction = _needing(plain, gibs, batches, stage)
    line = refusal(prediction)
    assert line.startswith("--gpu h100: conv_small with 8 images per GPU")
    assert line.endswith(fix)
    further = refusal(replace(prediction, can_recompute=True)).removeprefix(line)
    assert ("--activation_checkpointing" in further) == (stage is None)


def test_only_vits_can_recompute_their_blocks():
    assert _can_recompute(built(configured("simclr", arch="vit_tiny", patch_size=8)).backbone)
    assert not _can_recompute(built(configured("simclr", arch="conv_small")).backbone)


@pytest.mark.parametrize(
    ("method", "values", "world", "images", "flag"),
    [
        ("dino", {}, 4, 31, "--batch_size_per_gpu: .*32.*31"),
        ("dino", {"gradient_accumulation_steps": 2}, 4, 63, "--batch_size_per_gpu: .*64.*63"),
        ("dino", {"precision": "fp16", "zero_stage": 2}, 4, 6400, "--precision: "),
        ("moco", {}, 3, 6400, "--queue_length: .*24"),
    ],
)
def test_forecast_refuses_what_training_refuses(method, values, world, images, flag):
    with pytest.raises(ConfigError, match=flag):
        forecast(configured(method, arch="conv_small", **values), Cluster(GPUS["h100"], 1, world), images)


def test_fp16_has_stage_0_only_and_one_gpu_sends_nothing():
    prediction = forecast(configured("simclr", arch="conv_small", precision="fp16"), _NODE, 6400)
    assert list(prediction.stages) == [prediction.chosen]
    prediction = forecast(configured("simclr", arch="conv_small"), _on(100 * GIB, world=1), 6400)
    assert [stage.traffic for stage in prediction.stages] == [()] * 4
    assert prediction.chosen is prediction.stages[0]


@pytest.mark.parametrize(("name", "size"), [("deepcluster", 4 * (1000 * 16 + (1 << 24))), ("simclr", 0)])
def test_bytes_between_epochs_are_k_means_copies(name, size):
    assert methods.load(name).bytes_between_epochs(configured(name).settings, 1000) == size
