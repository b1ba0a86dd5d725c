"""Every public exception of fasttrain, with the exit status of a command that ends with it.

========================  ======  =====================================================
Exception                 Status  Cause
========================  ======  =====================================================
ConfigError, DataError    2       invalid input: a setting, a file, an image
SaveError                 2       a checkpoint cannot be written
Diverged, Collapsed       3       the loss is not finite, or the representation collapsed
Forgotten                 3       the reference set was forgotten
Interrupted               128+n   signal number n arrived
Crashed                   1       any other error
========================  ======  =====================================================
"""

from __future__ import annotations

import difflib
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from shlex import quote


class ConfigError(ValueError):
    """A setting is invalid. The message is one line: what is wrong and how to fix it."""

    status = 2


class DataError(ValueError):
    """Images cannot be read. The message is one line: which, why and how to fix it."""

    status = 2


class SaveError(ConfigError):
    """A checkpoint could not be written; the last complete one is intact."""


class Diverged(RuntimeError):
    """The loss, its gradient or the weights are not finite."""

    status = 3


class Collapsed(RuntimeError):
    """The representation collapsed, and the run was configured to stop in that case."""

    status = 3


class Forgotten(Collapsed):
    """Continued pretraining forgot its reference set, and the run was configured to stop in that case."""


class Crashed(RuntimeError):
    """An unexpected error. Its traceback was written to the run's folder or to stderr."""

    status = 1


class Interrupted(RuntimeError):
    """A signal stopped the run after a checkpoint was saved, or before its first step.

    ``status`` follows the shell's convention: 128 + the signal's number. SIGTERM gives 143, SIGINT 130 and SIGUSR1
    138, on which a batch script can requeue its job.
    """

    def __init__(self, number: signal.Signals, step: int, output: Path) -> None:
        resume = f"resume with --resume auto --output_dir {quote(str(output))}"
        super().__init__(f"stopped by {number.name} at step {step}; {resume if step else 'start the run again'}")
        self.status = 128 + number


_ELSEWHERE = {
    "arch": "model backbone architecture",
    "batch_size_per_gpu": "batch_size",
    "clip_grad": "gradient_clip_val",
    "config": "config_file",
    "data_path": "data data_dir dataset_path train_path train_data_path train_dataset_path",
    "epochs": "max_epochs num_epochs",
    "global_crops_size": "image_size img_size crop_size",
    "gradient_accumulation_steps": "accumulate_grad_batches accum_iter",
    "hidden_dim": "proj_hidden_dim",
    "init_from": "checkpoint pretrained pretrained_weights",
    "limit_steps": "steps max_steps",
    "local_crops_number": "num_crops",
    "log_every": "log_every_n_steps",
    "lr": "learning_rate base_lr blr",
    "momentum_teacher": "ema_momentum base_tau",
    "nmb_prototypes": "num_prototypes",
    "num_workers": "workers",
    "out_dim": "proj_output_dim",
    "output_dir": "out output checkpoint_dir",
    "precision": "fp16 use_fp16 amp",
    "resume": "no_resume overwrite resume_from_checkpoint",
    "saveckp_freq": "save_every",
    "val_path": "val_dir val_data_path",
    "zero_stage": "strategy",
}
"""The settings here, and their names in lightly-train, solo-learn, DINOv2 and MAE."""
_HERE = {other: name for name, others in _ELSEWHERE.items() for other in others.split()}


def unknown_name(what: str, name: object, known: Sequence[str], prefix: str = "") -> str:
    """Return a message for an unknown name that suggests the nearest known one."""
    other = _HERE.get(str(name).rpartition(".")[2])  # solo-learn and DINOv2 write optim.epochs
    close = [other] if other in known else difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {prefix}{close[0]}?" if close else "--help lists them all"
    return f"{what} is unknown; {hint}"


_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line breaks, marks that reverse the direction of text, and bytes that are no UTF-8."""


def printable(text: str, *, keep: str = "") -> str:
    """Return a text in which escapes such as backslash x1b replace characters that control a terminal.

    Characters in ``keep`` stay. File names, classes and archives may hold any characters, so every output that may
    name one calls this.
    """
    return _UNPRINTABLE.sub(lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], text)
