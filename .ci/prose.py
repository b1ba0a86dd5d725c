"""Check the English of the repository: words, constructions and names that CONTRIBUTING.md rules out.

    python .ci/prose.py [PATH ...]           # every tracked text file, or these; exit status 1 if something is found
    python .ci/prose.py --long 25 [PATH ...] # also list sentences of more than 25 words (advice, not an error)

Comments, docstrings, strings and Markdown are read, and the names that Python code assigns or defines.
Spelling is codespell's job.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

_SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".html", ".txt"}
_SKIPPED = {"LICENSE", "tests/public_api.txt", ".ci/prose.py", "tests/test_prose.py"}

_PER = "GPU|rank|step|second|image|row|epoch|batch|view|node|token|micro-step|head|parameter|core|week|day"
_UNITS = (
    "memory|images|ms|seconds|bytes|rows|tokens|microseconds|steps|numbers?|elements|messages|products|times|once|twice"
)
CONSTRUCTIONS = {
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\banew\b": "again",
    r"\blest\b": "so that ... not",
    r"\bwhereof\b|\bthereof\b|\bwhereby\b": "split the sentence",
    r"\bnor (does|do|is|are|has|have)\b": "split the sentence",
    r"\bheld to\b": "checked against, must match",
    r"\b(stand|stands|stood|standing) in for\b": "replace",
    r"\b(take|takes|took|taking) the place of\b|\bin (its|their|whose) (place|stead)\b": "replace, instead",
    r"\b(go|goes|went|going) on from\b|\bgoes on\b": "resume, continue",
    r"\b(take|takes|took|taken|taking) up\b": "resume, use",
    r"\bcut anew\b": "reshard",
    r"\b(passed|passing) over\b|\bpass(es)? over (it|them|a broken|a corrupt|what)\b": "skip",
    r"\bdoubts?\b": "warning",
    r"\bbeside\b": "next to, with, alongside",
    r"\bwhat is there\b": "installed, available",
    r"\b(that|those) of\b": "name the thing",
    r"\bthose (which|that|of which)\b": "name the thing",
    r"\bone that\b": "name the thing",
    r"\b(those|one) whose\b": "name the thing",
    r"\bso (many|often|long) (as|that|images|ranks|times|steps)\b": "N, or split the sentence",
    r"\b(is|are|was|were|be) told\b|\btold (by|of|apart)\b": "reported, set",
    r"\bnats apart\b|\bpoints below\b": "differ by N nats, N points lower",
    r"\bof late\b|(?-i:\bfor good\b)|\bat most so\b": "recently, permanently",
    r"\bas it stands\b|\bas they stand\b": "unchanged, as written",
    r"\bwhoever\b|\bwhichever way\b|\bwherever a\b": "name the thing",
    rf"\b({_UNITS}) an? ({_PER})\b": "per",
    r"\b(is|are) not (so|such)\b": "name the thing",
}
"""Regular expressions of constructions, and the plain form."""

NAMES = frozenset(
    ["found", "given", "held", "told", "there", "wanted", "everyone", "asked", "doubts", "mend", "mended", "mine"]
)
"""Names that say nothing: participles and adverbs. Use nouns of the field for variables, verbs for functions."""


def main(arguments: list[str]) -> int:
    """Print what is found; returns 1 if anything is."""
    limit = int(arguments[1]) if arguments[:1] == ["--long"] else None
    paths = [Path(argument) for argument in (arguments if limit is None else arguments[2:])] or list(_tracked())
    problems = 0
    for path in _files(paths):
        for line, text in _prose(path):
            for number, message in _constructions(text, line):
                print(f"{path}:{number}: {message}")
                problems += 1
            if limit is not None:
                for sentence in _sentences(text):
                    if (count := len(sentence.split())) > limit:
                        print(f"{path}:{line}: {count} words: {' '.join(sentence.split())[:110]}")
        if path.suffix == ".py":
            for number, name in _names(path):
                print(f"{path}:{number}: the name {name!r} says nothing: use a noun of the field")
                problems += 1
    print(f"{problems} problems" if problems else "no problems", file=sys.stderr)
    return int(problems > 0)


def _tracked() -> Iterator[Path]:
    output = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout
    yield from (Path(name) for name in output.splitlines())


def _files(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            yield from _files(sorted(path.iterdir()))
        elif path.suffix in _SUFFIXES and path.is_file() and path.as_posix() not in _SKIPPED:
            yield path


def _prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (first line, text) of everything that people read in a file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from _python_prose(text)
    elif path.suffix == ".md":
        yield 1, re.sub(r"```.*?```|`[^`\n]+`", lambda m: re.sub(r"[^\n]", "x", m[0]), text, flags=re.DOTALL)
    else:
        yield 1, text


def _python_prose(text: str) -> Iterator[tuple[int, str]]:
    comment: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            if comment and token.start[0] == last + 1:
                comment.append(token.string)
            else:
                if comment:
                    yield first, "\n".join(comment)
                comment, first = [token.string], token.start[0]
            last = token.start[0]
        elif token.type == tokenize.STRING or tokenize.tok_name[token.type] == "FSTRING_MIDDLE":
            yield token.start[0], re.sub(r"``[^`]*``", "x", token.string)
    if comment:
        yield first, "\n".join(comment)


def _constructions(text: str, first: int) -> Iterator[tuple[int, str]]:
    # Line breaks inside a sentence must not hide a construction; the line number is the match's.
    flat = re.sub(r"\n[ \t]*#? ?", lambda m: "\n" + " " * (len(m[0]) - 1), text)
    for pattern, plain in CONSTRUCTIONS.items():
        spaced = pattern.replace(" ", r"\s+")
        for match in re.finditer(spaced, flat, flags=re.IGNORECASE):
            yield first + flat.count("\n", 0, match.start()), f"{' '.join(match[0].split())!r}: write {plain}"


def _sentences(text: str) -> list[str]:
    paragraphs = re.split(r"\n\s*(?:#\s*)?\n|\n\s*[-*|] |\n {4,}\S.*", text)
    return [s for p in paragraphs for s in re.split(r"(?<=[.:?!])\s+", p.replace("#", " "))]


def _names(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in NAMES:
            yield node.lineno, node.id
        elif isinstance(node, ast.arg) and node.arg in NAMES:
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.strip("_") in NAMES:
            yield node.lineno, node.name


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
