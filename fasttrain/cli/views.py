"""``fasttrain views``: draw a contact sheet of the views that a training would see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config.arguments import Parser, parse
from ..errors import ConfigError
from ..flags import Count, FilePath, flag
from ..report.contact_sheet import contact_sheet


@dataclass(frozen=True)
class ViewsOptions:
    """The size and the place of a contact sheet."""

    images: Count = flag(4, "number of images")
    output: FilePath = flag("views.png", "file to write")


def main(arguments: Sequence[str]) -> int:
    """Draw the sheet for the flags of a training; return the exit status."""
    parser = Parser("views", "Draw the views that a training would see. Takes every flag of fasttrain train.")
    parser.add_settings("sheet", ViewsOptions)
    options, rest = parser.known_options(arguments, ViewsOptions)
    config, _ = parse(rest)
    sheet = contact_sheet(config, options.images)
    try:
        sheet.save(options.output)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--output {options.output}: cannot be written: {error}.") from None
    count = config.views.n_views
    print(f"{options.output}: {options.images} images, {count} views each, as {config.method} sees them in epoch 0")
    return 0
