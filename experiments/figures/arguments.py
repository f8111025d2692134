"""Command-line arguments the plot scripts share, and the records they ask for."""

import argparse
from pathlib import Path

from experiments.figures.curves import Runs
from experiments.figures.figures import Panel
from experiments.figures.scales import SCALES, find_resnet
from experiments.records import PAPER, NoRecordsError, RecordError, load_runs

CONTROL = "batch_size=128"  # SGD and Adam at the K-FACs' batch: in the table, not in the figure


def plot_arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with where to read records and where to draw."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--records", type=Path, default="runs", help="directory of the records")
    parser.add_argument("--output", type=Path, default="figures", help="directory of the figures")
    parser.add_argument(
        "--variant",
        default=PAPER,
        help="which settings to draw: 'paper' or overrides such as 'lr=0.01' (default: paper)",
    )
    parser.add_argument(
        "--allow-incomplete", action="store_true", help="draw unfinished runs too, marked as such"
    )
    return parser


def add_resnet_arguments(parser: argparse.ArgumentParser) -> None:
    """Where else the ResNet's records may be, and which of them to draw."""
    parser.add_argument(
        "--reference",
        type=Path,
        default="results",
        help="directory of the committed records; may be missing",
    )
    parser.add_argument(
        "--scale", choices=SCALES, help="of the ResNet (default: the first with all four optimizers)"
    )


def read_records(arguments: argparse.Namespace, problem: str) -> Runs:
    """The records the arguments ask for; exits with a message if there are none to draw."""
    try:
        return load_runs(
            arguments.records,
            problem,
            variant=arguments.variant,
            allow_incomplete=arguments.allow_incomplete,
        )
    except RecordError as error:
        raise SystemExit(f"error: {error}") from None


def read_resnet(arguments: argparse.Namespace) -> tuple[Panel, Runs | None]:
    """The ResNet's panel, and its controls if there are any.

    Raises:
        NoRecordsError: there is none to draw, here or committed.
    """

    def read(root: Path, problem: str) -> Runs:
        if root != arguments.records:
            return load_runs(root, problem)
        return load_runs(
            root, problem, variant=arguments.variant, allow_incomplete=arguments.allow_incomplete
        )

    try:
        found = find_resnet(read, arguments.records, arguments.reference, arguments.scale)
        controls = _read_controls(found.root, found.scale.problem)
    except NoRecordsError:
        raise
    except RecordError as error:
        raise SystemExit(f"error: {error}") from None
    wanted = SCALES[arguments.scale].problem if arguments.scale else found.scale.problem
    if (found.root, found.scale.problem) != (arguments.records, wanted):
        print(f"{wanted}: nothing to draw in {arguments.records}; drawn: {found.root / found.scale.problem}")
    note = "" if found.root == arguments.records else "committed records"
    return Panel(found.scale.title, found.runs, note), controls


def _read_controls(root: Path, problem: str) -> Runs | None:
    try:
        return load_runs(root, problem, variant=CONTROL)
    except NoRecordsError:
        return None
