"""``fasttrain report RUN...``: write a page about one run or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config.arguments import Parser
from ..errors import ConfigError
from ..flags import FilePath, Natural, flag, user_path
from ..methods import load_plugin
from ..report.write import IMAGES, write_report
from . import views


@dataclass(frozen=True)
class ReportOptions:
    """The content and the place of a report."""

    output: FilePath | None = flag(None, "file to write; default: report.html in the folder of the first run")
    images: Natural = flag(IMAGES, "images in the map of features; 0: leave out everything that needs the data")
    plugin: FilePath | None = flag(None, "Python file that registers the run's method; it is run")
    views: bool = flag(False, "alias of fasttrain views, with the flags of a training")


def main(arguments: Sequence[str]) -> int:
    """Write the page; return the exit status. ``fasttrain report --views`` is an alias of ``fasttrain views``."""
    if "--views" in arguments:
        return views.main([argument for argument in arguments if argument != "--views"])
    parser = Parser("report", "Write a page that shows one run, or several next to each other.")
    parser.add_argument("runs", nargs="*", type=user_path, metavar="RUN", help="folders of runs")
    parser.add_settings("report", ReportOptions)
    namespace, (options,) = parser.options(arguments, ReportOptions)
    if not namespace.runs:
        raise ConfigError("RUN: is missing. Give the folders of one run or several.")
    if options.plugin is not None:
        load_plugin(options.plugin)
    path, size = write_report(namespace.runs, options.output, images=options.images)
    count = len(set(namespace.runs))
    print(f"{path}: {count} run{'s' * (count > 1)}, {size / 1e3:,.0f} kB")
    return 0
