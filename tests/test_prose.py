"""The English of the repository: spelling, and the words and constructions that the style rules out."""

import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent
_RULES = _ROOT / ".ci/prose.py"


def _check(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=_ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not (_ROOT / ".git").exists(), reason="lists the files with git")
def test_no_ruled_out_word_or_name_is_left():
    done = _check(_RULES)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_spelling_is_right():
    done = _check("-m", "codespell_lib", ".")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "content", "count"),
    [
        ("a.md", "To mend it, start anew.", 2),
        ("a.md", "`mend` in code and ```\nanew\n``` are no prose.", 0),
        ("a.py", '"""What a rank sends: memory a GPU."""\n', 1),
        ("a.py", "# It is held\n# to the reference.\n", 1),
        ("a.py", "found = 1\n\n\ndef told(given):\n    return given\n", 3),
        ("a.py", "checkpoint = 1  # memory per GPU\n", 0),
    ],
)
def test_prose_check_reports_words_and_names(tmp_path, name, content, count):
    (tmp_path / name).write_text(content)
    done = _check(_RULES, tmp_path / name)
    assert len(done.stdout.splitlines()) == count
    assert done.returncode == (count > 0)
