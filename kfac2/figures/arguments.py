"""Command-line arguments the plot scripts share."""

import argparse
from pathlib import Path

import pandas as pd

from kfac2.figures.records import RecordError, load_records


def plot_arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with where to read records and where to draw."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--records", type=Path, default="runs", help="directory of the records")
    parser.add_argument("--output", type=Path, default="figures", help="directory of the figures")
    parser.add_argument(
        "--variant",
        default="paper",
        help="which settings to draw: 'paper' or overrides such as 'lr=0.01' (default: paper)",
    )
    parser.add_argument(
        "--allow-incomplete", action="store_true", help="draw unfinished runs too, marked as such"
    )
    return parser


def read_records(arguments: argparse.Namespace, problem: str) -> pd.DataFrame:
    """The records the arguments ask for; exits with a message if there are none to draw."""
    try:
        return load_records(
            arguments.records,
            problem,
            variant=arguments.variant,
            allow_incomplete=arguments.allow_incomplete,
        )
    except RecordError as error:
        raise SystemExit(f"error: {error}") from None
