"""Texts that are printed, whatever names they hold."""

import pytest

from fasttrain.errors import printable


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("data/größe 猫.png", "data/größe 猫.png"),
        ("\x1b[31mred\nline", r"\x1b[31mred\nline"),
        ("\x9b1m\x7f\u2028\u202egnp", r"\x9b1m\x7f\u2028\u202egnp"),
        ("caf\udce9.png", r"caf\udce9.png"),
    ],
)
def test_control_characters_are_escaped(text, printed):
    assert printable(text) == printed
    assert printable(text, keep=text) == text
