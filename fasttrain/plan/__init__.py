"""``fasttrain plan``: what a run will need, before it is started; without a GPU, and without a tensor of any size.

``trace`` and ``update`` make one step on tensors that have shapes only, and ``ledger`` and ``group`` write down what it
does; ``memory``, ``communication`` and ``step_time`` turn that into bytes and seconds for a GPU of ``hardware``;
``forecast`` puts them together, and ``report`` prints it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0 if the run fits, 2 if it does not or something cannot be used."""
    from ..distributed.world import prepare_environment

    prepare_environment()
    try:
        from ..cli.plan import main as command
        from ..engine.zero import quiet_deepspeed
    except ModuleNotFoundError as error:
        print(f"fasttrain: the plan needs {error.name}; type: pip install 'fasttrain[train]'", file=sys.stderr)
        return 2
    quiet_deepspeed()
    return command(arguments)
