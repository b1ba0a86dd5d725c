"""The trainer's command: ``deepspeed fasttrain/run.py --method dino --entropy``; torchrun and python run it too."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fasttrain.config.settings import Config
    from fasttrain.distributed.world import World

# A script's folder comes first on sys.path; here that would let `kernels/`, `report/` and the like pass for other
# people's packages of the same name.
sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != Path(__file__).resolve().parent]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trainer; returns the exit status.

    0 finished; 1 an error that was not foreseen; 2 something given cannot be used; 3 the loss or its gradient is not
    finite or, if asked to stop then, the representation collapsed; 143, 130, 138 stopped by SIGTERM, SIGINT, SIGUSR1.
    """
    try:
        from fasttrain.distributed.world import prepare_environment, world_from_environment
    except ModuleNotFoundError:
        return _fail("fasttrain is not installed here; type: pip install -e '.[train]'")
    prepare_environment()
    world = world_from_environment()
    try:
        from fasttrain.config.arguments import asks_for_recipes, parse, print_recipes
        from fasttrain.errors import ConfigError
    except ModuleNotFoundError as error:
        return _fail(_missing(error))
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if asks_for_recipes(given):
            if world.is_main:
                print_recipes()
            return 0
        config, print_only = parse(given)
    except ConfigError as error:
        return _end(world, str(error))
    if print_only:
        if world.is_main:
            print(config.to_yaml(), end="")
        return 0
    return _train(config, world)


def _train(config: Config, world: World) -> int:
    """Train as a command that can be used asks. What takes seconds to import is not imported before."""
    from fasttrain.distributed.world import initialise
    from fasttrain.errors import ConfigError

    try:
        from fasttrain.distributed.watchdog import starting
        from fasttrain.engine.engine import quiet_deepspeed
        from fasttrain.errors import Collapsed, Crashed, Diverged, Interrupted
        from fasttrain.pipelines import DataError
        from fasttrain.training.trainer import train
    except ModuleNotFoundError as error:
        return _fail(_missing(error))

    quiet_deepspeed()
    try:
        with starting(world, config.train.watchdog_minutes):
            initialise(world)
        summary = train(config, world)
    except (ConfigError, DataError) as error:
        return _end(world, str(error))
    except KeyboardInterrupt:
        return _end(world, "stopped at once by a second SIGINT; the last checkpoint stays", 130)
    except Crashed as error:
        return _fail(str(error), 1)
    except (Collapsed, Diverged, Interrupted) as error:
        status = error.status if isinstance(error, Interrupted) else 3
        return _fail(str(error), status) if world.is_main else status
    if world.is_main:
        print(_final_line(summary))
    return 0


def _end(world: World, message: str, status: int = 2) -> int:
    """End with a line that maybe no other rank knows; where several have one, the first to end says its own."""
    from fasttrain.distributed.watchdog import first_to_end, linger

    if first_to_end(world, status):
        _fail(message)
        linger(world)
    return status


def _missing(error: ModuleNotFoundError) -> str:
    return f"the trainer needs {error.name}; type: pip install 'fasttrain[train]'"


def _final_line(summary: dict[str, object]) -> str:
    figures = [f"{key} {value:.3f}" for key, value in summary.items() if "knn" in key and isinstance(value, float)]
    what = f"{summary['method']}{'+ER' if summary['entropy_objective'] else ''}"
    return "  ".join([f"{what} finished: {summary['steps']} steps in {summary['seconds']:.0f} s", *figures])


def _fail(message: str, status: int = 2) -> int:
    print(f"fasttrain: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
