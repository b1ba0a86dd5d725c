"""The update's state, memory traffic and messages."""

import pytest

from fasttrain.plan.update import trace_update

from .small import built, configured


def _counted(method):
    trained = 4 * sum(p.numel() for p in method.parameters() if p.requires_grad)
    teacher = 0 if method.teacher is None else 4 * sum(p.numel() for p in method.teacher.parameters())
    return trained, teacher


@pytest.mark.parametrize(
    ("optimizer", "moments", "moved"),
    # adamw reads weight, gradient and two moments, and writes weight and moments. sgd has one moment. In torch's
    # schemas both write the gradient too.
    [("adamw", 2, 8), ("sgd", 1, 6), ("lars", 1, None), ("lamb", 2, None)],
)
def test_update_counts_state_and_traffic_of_optimizers(optimizer, moments, moved):
    config = configured("dino", arch="conv_small", optimizer=optimizer, clip_grad=0)
    method = built(config)
    trained, teacher = _counted(method)
    update = trace_update(method, config.train, world=1)
    assert update.state == pytest.approx(moments * trained, rel=0.001)
    assert update.teacher_moved == 3 * teacher
    if moved is not None:
        assert update.moved == pytest.approx(moved * trained, rel=0.01)
        assert update.temporary == 0
    else:  # they need temporary copies
        assert update.temporary > 0.5 * trained
    assert update.messages == ()


@pytest.mark.parametrize("each", [False, True])
def test_update_counts_reads_and_writes_of_clipping(each):
    plain, clipped = (
        trace_update(built(config), config.train, world=1)
        for config in (configured("dino", arch="conv_small", clip_grad=clip, clip_each=each) for clip in (0, 1))
    )
    trained, _ = _counted(built(configured("dino", arch="conv_small")))
    assert clipped.moved - plain.moved == pytest.approx(3 * trained, rel=0.01)


def test_update_of_moco_sends_statistics_after_the_step():
    config = configured("moco", arch="conv_small")
    method = built(config, 4)
    (message,) = trace_update(method, config.train, world=4).messages
    running = [x for name, x in method.named_buffers() if "running_" in name]
    assert (message.kind, message.bytes) == ("broadcast", 4 * sum(x.numel() for x in running))
