"""``fasttrain train``: train on one rank or several, and write the run's report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from shlex import quote
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ..config import recipes
from ..config.arguments import lists_recipes, parse
from ..config.resolve import Config
from ..distributed.world import World, initialise
from ..errors import Collapsed, ConfigError, Crashed, DataError, Diverged, Interrupted
from . import fail

if TYPE_CHECKING:
    from ..training.trainer import Outcome


def main(arguments: Sequence[str]) -> int:
    """Train; return the exit status (see :func:`fasttrain.cli.main`)."""
    world = World.from_environment()
    try:
        if lists_recipes(arguments):
            if world.is_main:
                print_recipes()
            return 0
        config, print_only = parse(arguments)
    except ConfigError as error:
        return _end(world, str(error))
    if print_only:
        if world.is_main:
            print(config.to_yaml(), end="")
        return 0
    return _train(config, world)


def _train(config: Config, world: World) -> int:
    # These imports take seconds, which an invalid flag and --help should not wait for.
    from ..distributed.watchdog import starting
    from ..engine.zero import quiet_deepspeed
    from ..training.trainer import train

    quiet_deepspeed()
    try:
        with starting(world, config.train.watchdog_minutes):
            initialise(world)
        outcome = train(config, world)
    except (ConfigError, DataError) as error:
        return _end(world, str(error))
    except KeyboardInterrupt:
        return _end(world, "a second SIGINT stopped the run at once. The last checkpoint is intact.", 130)
    except Crashed as error:
        return fail(str(error), error.status)
    except (Collapsed, Diverged, Interrupted) as error:
        return fail(str(error), error.status) if world.is_main else error.status
    if world.is_main:
        _write_report(outcome)
        if outcome.ignored:
            ignored = ", ".join(outcome.ignored)
            fail(f"--output_dir: this run was finished before, so {ignored} has no effect. Use another folder.")
        print(_final_line(outcome))
    return 0


def _write_report(outcome: Outcome) -> None:
    """Write report.html from the logged values. Pictures take time and the data, so they are left to the command."""
    if outcome.steps:
        from ..report.write import write_report

        write_report([outcome.output], images=0)
        pictures = f"fasttrain report {quote(str(outcome.output))}"
        print(f"{outcome.output}/report.html shows the run. Add pictures: {pictures}")


def _end(world: World, message: str, status: int = 2) -> int:
    """End with a line that other ranks may not know. If several ranks have one, only the first prints its own."""
    from ..distributed.watchdog import first_to_end, linger

    if first_to_end(world, status):
        fail(message)
        linger(world)
    return status


def _final_line(outcome: Outcome) -> str:
    summary = outcome.summary
    figures = [f"{key} {value:.3f}" for key, value in summary.items() if "knn" in key and isinstance(value, float)]
    title = f"{summary['method']}{'+ER' if summary['entropy_objective'] else ''}"
    return "  ".join([f"{title} finished: {summary['steps']} steps in {summary['seconds']:.0f} s", *figures])


def print_recipes() -> None:
    """Print a table of all recipes with the published results of their values."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 1, 0))
    for column in ("method", "recipe", "network", "epochs", "published, and the source of the values"):
        table.add_column(column, no_wrap=column in ("method", "recipe"))
    for entry in recipes.entries():
        published = f"{entry.published}\n{entry.source}"
        table.add_row(entry.method, entry.recipe, entry.arch, str(entry.epochs), published)
    Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False).print(table)
