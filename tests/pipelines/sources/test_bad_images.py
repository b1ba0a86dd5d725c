import logging
import math
import threading
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasttrain.pipelines import ArraySource, DataError
from fasttrain.pipelines.sources.bad_images import BadImages, _stride


def source(count):
    return ArraySource(np.zeros((count, 1, 1, 1), np.uint8), name="thing")


@given(st.integers(1, 5000))
def test_stride_visits_all_and_jumps_far(count):
    stride = _stride(count)
    assert math.gcd(stride, count) == 1
    assert count < 50 or 0.6 * count < stride < 0.7 * count


def test_candidates_are_all_but_the_bad_ones():
    bad = BadImages(source(12), 1.0, None)
    assert list(islice(bad.candidates(5), 3)) == [5, 0, 7]  # a stride of 7
    assert sorted(islice(bad.candidates(5), 12)) == list(range(12))
    for i in (5, 7):
        bad.add(i, "why")
    assert list(islice(bad.candidates(5), 3)) == [0, 2, 9]
    assert sorted(islice(bad.candidates(5), 10)) == sorted(set(range(12)) - {5, 7})
    with pytest.raises(DataError, match="thing: none of its 12 images can be read; thing 5: why"):
        list(bad.candidates(5))


def test_neighbours_are_replaced_by_different_images():
    bad = BadImages(source(1000), 1.0, None)
    for i in range(100):
        bad.add(i, "lost")
    replacements = [next(bad.candidates(i)) for i in range(100)]
    assert len(set(replacements)) == 100
    assert min(replacements) >= 100


def test_each_is_named_once(caplog):
    bad = BadImages(source(300), 1.0, None)
    threads = [threading.Thread(target=lambda: [bad.add(i, f"why {i}") for i in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = sorted(record.getMessage() for record in caplog.records)
    assert lines == sorted(f"thing {i}: why {i}; left out from now on" for i in range(200))
    assert bad.reasons == {f"thing {i}": f"why {i}" for i in range(200)}


def run(bad, order, is_bad):
    """Read images in an order; how many were tried before it was too many, and the message."""
    for k, i in enumerate(order):
        try:
            for j in bad.candidates(int(i)):
                if not is_bad(j):
                    break
                bad.add(j, "broken")
        except DataError as error:
            return k, str(error)
    return len(order), ""


def test_too_many_of_a_shuffled_source(caplog):
    caplog.set_level(logging.ERROR)
    order = np.random.default_rng(0).permutation(10_000)
    broken = np.random.default_rng(1).random(10_000)
    tried, message = run(BadImages(source(10_000), 0.1, None), order, lambda i: broken[i] < 0.3)
    assert 10 < tried < 100
    assert message.startswith("thing: 11 of ")
    assert "images cannot be read, more than the fraction 0.1 allowed (max_bad_fraction); thing " in message
    assert message.endswith(": broken")
    assert run(BadImages(source(10_000), 0.1, None), order, lambda i: broken[i] < 0.05) == (10_000, "")
    assert run(BadImages(source(10_000), 0.4, None), order, lambda i: broken[i] < 0.3) == (10_000, "")
    assert run(BadImages(source(10_000), 0.0, None), order, lambda i: i == 7)[1].startswith("thing: 1 of ")


def test_a_lost_folder_is_not_too_many():
    """3 % in a row: neither where it is read in order, nor where a replacement is sought for each of its images."""
    lost = range(2_000, 2_300)
    for order, whole in ((range(10_000), 10_000), (np.random.default_rng(0).permutation(10_000), None)):
        assert run(BadImages(source(10_000), 0.1, whole), order, lambda i: i in lost) == (10_000, "")


def test_in_order_the_whole_counts():
    tried, message = run(BadImages(source(10_000), 0.1, 10_000), range(10_000), lambda i: 200 <= i < 4_000)
    assert tried == 200 + 1_000
    assert message.startswith("thing: 1001 of 10000 images cannot be read")


def test_where_all_are_bad_few_are_tried(caplog):
    tried, message = run(BadImages(source(10_000), 0.1, 10_000), range(10_000), lambda i: True)
    assert (tried, len(caplog.records)) == (0, 11)
    assert message.startswith("thing: 11 of 11 images cannot be read, more than the fraction 0.1")
    tried, message = run(BadImages(source(500), 1.0, None), range(500), lambda i: True)
    assert (tried, message) == (0, "thing: none of its 500 images can be read; thing 0: broken")


def test_few_images_are_not_judged_by_one():
    assert run(BadImages(source(4), 0.1, None), range(4), lambda i: i == 2) == (4, "")
