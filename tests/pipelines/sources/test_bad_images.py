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

SHUFFLED = np.random.default_rng(0).permutation(10_000)
DRAWS = np.random.default_rng(1).random(10_000)


def bad_images(count, most=1.0, total=None):
    return BadImages(ArraySource(np.zeros((count, 1, 1, 1), np.uint8), name="thing"), most, total)


@given(st.integers(1, 5000))
def test_stride_visits_all_and_jumps_far(count):
    stride = _stride(count)
    assert math.gcd(stride, count) == 1
    assert count < 50 or 0.6 * count < stride < 0.7 * count


def test_candidates_are_all_but_the_bad_ones():
    bad = bad_images(12)
    assert list(islice(bad.candidates(5), 3)) == [5, 0, 7]  # a stride of 7
    assert sorted(islice(bad.candidates(5), 12)) == list(range(12))
    for i in (5, 7):
        bad.add(i, "why")
    assert list(islice(bad.candidates(5), 3)) == [0, 2, 9]
    assert sorted(islice(bad.candidates(5), 10)) == sorted(set(range(12)) - {5, 7})
    with pytest.raises(DataError, match=r"none of its 12 images.*thing 5: why"):
        list(bad.candidates(5))


def test_bad_image_is_logged_once_by_several_threads(caplog):
    bad = bad_images(300)
    threads = [threading.Thread(target=lambda: [bad.add(i, f"why {i}") for i in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = sorted(record.getMessage() for record in caplog.records)
    assert lines == sorted(f"thing {i}: why {i}; left out from now on" for i in range(200))
    assert bad.reasons == {f"thing {i}": f"why {i}" for i in range(200)}


@pytest.mark.parametrize(
    ("bad", "order", "is_bad", "tried", "message"),
    [
        # Shuffled: the fraction of the images so far.
        (bad_images(10_000, 0.1), SHUFFLED, lambda i: DRAWS[i] < 0.3, range(11, 100), "11 of "),
        (bad_images(10_000, 0.1), SHUFFLED, lambda i: DRAWS[i] < 0.05, [10_000], ""),
        (bad_images(10_000, 0.0), SHUFFLED, lambda i: i == 7, range(10_000), "1 of "),
        # In order: the fraction of all images. A lost folder of 3 % in a row is no error.
        (bad_images(10_000, 0.1, 10_000), range(10_000), lambda i: 2_000 <= i < 2_300, [10_000], ""),
        (bad_images(10_000, 0.1, 10_000), range(10_000), lambda i: 200 <= i < 4_000, [1_200], "1001 of 10000 "),
        # If all are bad, few are tried. One of few is no evidence.
        (bad_images(10_000, 0.1, 10_000), range(10_000), lambda i: True, [0], "11 of 11 "),
        (bad_images(500), range(500), lambda i: True, [0], "none of its 500 "),
        (bad_images(4, 0.1), range(4), lambda i: i == 2, [4], ""),
    ],
)
def test_too_many_bad_images_are_an_error(caplog, bad, order, is_bad, tried, message):
    caplog.set_level(logging.ERROR)
    count, error = 0, ""
    try:
        for count, i in enumerate(order):  # noqa: B007
            for j in bad.candidates(int(i)):
                if not is_bad(j):
                    break
                bad.add(j, "corrupt")
        count = len(order)
    except DataError as raised:
        error = str(raised)
    assert count in tried
    assert error.startswith(message and f"thing: {message}")
    assert bool(error) == bool(message)
    assert not error or error.endswith(": corrupt")
