"""Seeds as a pure function of numbers, so that a resumed run draws the same, also under another version of Python."""

from __future__ import annotations

_BITS = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: splitmix64's increment


def seed_of(number: int, *numbers: int) -> int:
    """Return a seed in [0, 2**63) that is a hash of the numbers and of their order.

    Each number is hashed by splitmix64 and mixed into the hash of the numbers before it.
    ``fasttrain.pipelines.views.draw.uniforms`` makes its key of (seed, epoch, index) in the same way.
    """
    key = _splitmix64(number & _BITS)
    for position, other in enumerate(numbers, 1):
        key = _splitmix64(key ^ _splitmix64((other + position * _GOLDEN) & _BITS))
    return key >> 1


def _splitmix64(x: int) -> int:
    """Finalise as splitmix64 does (Steele, Lea, Flood 2014): every input bit changes half of the output bits."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _BITS
    return x ^ (x >> 31)
