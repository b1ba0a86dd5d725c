from bench.kernels import launches


def test_launches_and_operators_are_counted():
    """A row takes one kernel forward and one backward; torch adds the sums of their spans, and the loss."""
    counted, operators = launches.count(launches._cases()["InfoNCE"])
    assert 3 <= counted <= 41
    assert counted < operators <= 57


def test_views_and_allocations_are_no_launches():
    with launches.Counter() as counter:
        launches.torch.empty(3).view(3, 1).add_(1)
    assert (counter.launches, counter.operators) == (1, 3)
