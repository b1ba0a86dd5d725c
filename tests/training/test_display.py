"""The display, with and without a terminal, under a clock that the test controls."""

import io
import logging
import os
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
from rich.console import Console

from fasttrain.training import display as progress
from fasttrain.training.display import DataNotes, Display, new_console

_VALUES = {"loss": 1.23456, "entropy": 2.5, "images_per_s": 12345.6, "momentum": None, "lr": 0.1}


class _Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return _Clock(monkeypatch)


def _display(total, done=0, *, terminal=False, **options):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, highlight=False, color_system=None)
    display = Display(total, done, console=console, **options)
    display.begin(done)
    return display


def _out(display):
    return display.console.file.getvalue()


def test_lines_are_printed_at_intervals_and_at_the_end(clock):
    with _display(100, interval=10) as display:
        for step in range(1, 101):
            clock.now += 1
            display.step(step, _VALUES)
    lines = [line for line in _out(display).splitlines() if line.startswith("step")]
    shown = [int(line.split()[1].partition("/")[0]) for line in lines]
    assert shown == [*range(1, 101, 10), 100]


def test_line_has_the_latest_of_every_figure(clock):
    with _display(10, interval=0) as display:
        display.step(1, _VALUES)
        display.step(2, {"loss": 1.0, "knn_top1": 0.25, "entropy": None})
    first, second = _out(display).splitlines()
    assert first == "step 1/10  12,346 img/s  loss 1.2346  entropy 2.500  0:00:00 left"
    assert second == "step 2/10  12,346 img/s  loss 1.0000  entropy 2.500  k-NN 0.250  0:00:00 left"


def test_names_cannot_control_the_terminal(capsys):
    """A file name with a line break printed a line that looked like fasttrain's own."""
    name = "\x1b[31m\nfasttrain: all is well.png"
    new_console().print(name, "is bad")
    with DataNotes():
        logging.getLogger("fasttrain.data").warning("%s: unreadable", name)
    for line in capsys.readouterr().out.splitlines():
        assert line.startswith(r"\x1b[31m\nfasttrain: all is well.png")


def test_steps_without_figures_print_no_line(clock):
    with _display(10, interval=0) as display:
        display.step(1)
        display.step(10)
    assert _out(display) == ""


def test_time_left_counts_steps_of_this_process(clock):
    with _display(1100, done=1000, interval=0) as display:
        clock.now += 3600
        display.step(1050, _VALUES)
        clock.now += 3599
        display.step(1099, _VALUES)
    lines = [line.split("  ")[-1] for line in _out(display).splitlines()]
    assert lines[1:] == ["1:00:00 left", "0:01:12 left"]


@pytest.mark.parametrize(
    ("total", "seconds", "expected"),
    [(50, 1, None), (600, 1, "10 min"), (100, 60, "1 h 40 min"), (10_000, 60, "6 days 22 h")],
)
def test_duration_of_the_run_is_printed_after_the_first_steps(clock, total, seconds, expected):
    with _display(total, interval=1e9, too_long="use another") as display:
        clock.now += 1000  # the first step compiles
        for step in range(1, 30):
            display.step(step)
            clock.now += seconds
    shown = _out(display).splitlines()
    assert [line.rpartition("take ")[2] for line in shown[:1]] == ([expected] if expected else [])
    assert shown[1:] == (["use another"] if expected and "days" in expected else [])


def test_work_between_steps_has_lines_with_the_time_left(clock):
    with _display(100, interval=10) as display:
        for done in range(0, 1001, 10):
            display.work("k-NN", done, 1000)
            clock.now += 0.5
        display.work("pixels", 1000, 1000)  # quick work prints nothing
    lines = _out(display).splitlines()
    assert lines == [f"k-NN: {done}/1,000 images  0:00:{(1000 - done) // 20:02d} left" for done in (200, 400, 600, 800)]


def test_work_between_steps_has_a_bar_in_a_terminal():
    with _display(4, terminal=True) as display:
        display.work("k-NN", 50, 100)
        assert "50/100 images, k-NN" in _bar_text(display)
        display.work("k-NN", 100, 100)
        assert "k-NN" not in _bar_text(display)


def _bar_text(display):
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(display._bar.get_renderable())
    return console.file.getvalue()


def test_brackets_in_a_path_are_printed_as_they_are(capsys):
    Display(1).note("into runs[/a] and [bold]b[/bold]")
    assert capsys.readouterr().out == "into runs[/a] and [bold]b[/bold]\n"


def test_terminal_shows_a_bar_with_the_figures():
    with _display(4, terminal=True) as display:
        display.note("a line above")
        for step in range(1, 5):
            display.step(step, {"loss": step / 2})
    out = _out(display)
    assert "a line above" in out
    assert "4/4 steps" in out
    assert "loss 2.0000" in out
    assert display._bar.finished
    assert not display._bar.live.is_started


def test_bar_starts_at_the_resumed_step():
    with _display(8, done=6, terminal=True) as display:
        assert display._bar.tasks[0].completed == 6


def test_bar_is_removed_when_a_run_fails():
    display = _display(4, terminal=True)
    with pytest.raises(RuntimeError), display:
        raise RuntimeError
    assert not display._bar.live.is_started


def test_notes_name_each_file_once_on_stdout(capsys):
    log = logging.getLogger("fasttrain.data")
    with DataNotes():
        log.warning("%s: %s; left out", "a.jpg", "not an image")
        log.warning("%s: %s; left out", "b.jpg", "not an image")
        log.warning("%s: %s; left out", "a.jpg", "corrupt")
        log.warning("something else")
    assert capsys.readouterr() == ("a.jpg: not an image; left out\nb.jpg: not an image; left out\nsomething else\n", "")
    with DataNotes():  # another run reports again
        log.warning("%s: %s; left out", "a.jpg", "not an image")
    assert capsys.readouterr().out == "a.jpg: not an image; left out\n"
    assert log.handlers == []


def _notebook(monkeypatch, *, widgets):
    """Return a display in a fake notebook, the list that IPython shows, and the final content of its widget."""
    shown, widget = [], []

    class Output:
        def clear_output(self, wait=False):
            widget.clear()

        def __enter__(self):
            shown, self.before = widget, shown_in[0]
            shown_in[0] = shown

        def __exit__(self, *error):
            shown_in[0] = self.before

    shown_in = [shown]
    ipython = types.ModuleType("IPython.display")
    ipython.display = lambda *things: shown_in[0].extend(things)
    modules = {"IPython": types.ModuleType("IPython"), "IPython.display": ipython}
    if widgets:
        modules["ipywidgets"] = types.ModuleType("ipywidgets")
        modules["ipywidgets"].Output = Output
        modules["ipywidgets"].__spec__ = ModuleSpec("ipywidgets", None)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    if not widgets:
        monkeypatch.setitem(sys.modules, "ipywidgets", None)
        monkeypatch.setattr(progress, "find_spec", lambda name: None)
    console = Console(force_jupyter=True, width=200, highlight=False)
    return Display(3, console=console, interval=0), shown, widget


def test_file_name_that_is_not_utf8_is_printed(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8", errors="strict"))
    name = os.fsdecode(b"caf\xe9-\xc3\xa9.png")
    # Not through the logger: pytest stores log records, and its workers cannot send such a name.
    DataNotes().emit(logging.makeLogRecord({"msg": "%s cannot be read", "args": (name,)}))
    assert written.getvalue().decode() == "caf\\udce9-é.png cannot be read\n"


def test_notebook_shows_one_moving_bar(monkeypatch):
    display, shown, widget = _notebook(monkeypatch, widgets=True)
    display.begin(0)
    with display:
        display.note("hello")
        for step in range(1, 4):
            display.step(step, _VALUES)
    assert [type(thing).__name__ for thing in shown].count("Output") == 1  # one widget, shown once
    assert sum("hello" in thing.text for thing in shown if hasattr(thing, "text")) == 1
    (last,) = widget  # it holds the latest bar only
    assert "3/3" in last.text
    assert "loss 1.2346" in last.text


def test_notebook_without_widgets_prints_lines(monkeypatch, recwarn):
    display, shown, _ = _notebook(monkeypatch, widgets=False)
    with display:
        for step in range(1, 4):
            display.step(step, _VALUES)
    lines = [thing.text for thing in shown]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert not [warning for warning in recwarn if "ipywidgets" in str(warning.message)]
