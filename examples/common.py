"""Checks of arguments that several programs share."""

import argparse
from collections.abc import Callable
from pathlib import Path


def at_least(least: int) -> Callable[[str], int]:
    """Return the type of an argument that is an integer of at least `least`."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
        return int(text)

    return parse


def check_plot_and_files(parser: argparse.ArgumentParser, plot: Path, *others: Path) -> None:
    """Stop the program if a file cannot be written. A new file is created, and stays empty until the end."""
    from matplotlib.backend_bases import FigureCanvasBase

    endings = FigureCanvasBase.get_supported_filetypes()
    if plot.suffix[1:].lower() not in endings:
        parser.error(f"--plot must end in one of .{', .'.join(endings)}, got {plot}")
    for path in (plot, *others):
        try:
            path.open("ab").close()
        except OSError as error:
            parser.error(f"{path} cannot be written ({error.strerror}); name another file")
