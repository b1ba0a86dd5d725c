"""Read the commands of the documentation."""

import re
import shlex
from pathlib import Path

_ROOT = Path(__file__).parent.parent
DOCS = sorted((_ROOT / "docs").glob("*.md"))
PAGES = [_ROOT / "README.md", *DOCS]


def shell_commands(text):
    """Yield the simple commands of the bash blocks as lists of words, without the placeholder ``...``."""
    for block in re.findall(r"^ *```bash\n(.*?)^ *```$", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.shlex(line, posix=True, punctuation_chars="&;|")
            words.whitespace_split = True
            command = []
            for word in [*words, ";"]:
                if set(word) <= set("&;|"):
                    yield command
                    command = []
                elif word != "...":
                    command.append(word)


def fasttrain_words(words):
    """Return the arguments of ``fasttrain`` in a command, without its launcher; None for any other command."""
    for start in ("fasttrain/run.py", "examples/slurm.sh"):
        if start in words:
            return ["train", *words[words.index(start) + 1 :]]
    if "fasttrain" in words:
        return words[words.index("fasttrain") + 1 :]
    return None


def commands(page):
    """Return the arguments of ``fasttrain`` in every command of a page, in blocks and in sentences."""
    text = page.read_text()
    result = list(shell_commands(text))
    # A sentence must show a whole command, without choices and placeholders.
    spans = re.findall(r"`(fasttrain (?:train|plan|eval|export|report|views) [^`\n]*-[^`\n]*|--method [^`\n]*)`", text)
    for span in spans:
        if not set("|[…") & set(span) and not re.search(r" M\b|\.\.\.", span):
            result.append(shlex.split(span if span.startswith("fasttrain") else f"fasttrain train {span}"))
    return [words for words in map(fasttrain_words, result) if words]
