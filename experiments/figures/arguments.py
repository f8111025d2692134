"""What the plot scripts share: command-line arguments, the records they ask for, and what is said of the files."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from experiments.figures.curves import Runs
from experiments.figures.figures import Panel
from experiments.figures.scales import SCALES, find_resnet
from experiments.records import PAPER, NoRecordsError, RecordError, load_runs

CONTROL = "batch_size=128"  # SGD and Adam at the K-FACs' batch: in the table, not in the figure


@contextmanager
def readable() -> Iterator[None]:
    """A record inside that cannot be read ends the script with one line."""
    try:
        yield
    except RecordError as error:
        raise SystemExit(f"error: {error}") from None


def place_arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with where to read records and where to draw."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--records", type=Path, default="runs", help="directory of the records")
    parser.add_argument("--output", type=Path, default="figures", help="directory of the figures")
    return parser


def plot_arguments(description: str | None) -> argparse.ArgumentParser:
    """``place_arguments``, and which of the records to draw."""
    parser = place_arguments(description)
    parser.add_argument(
        "--variant",
        default=PAPER,
        help="which settings to draw: 'paper' or overrides such as 'lr=0.01' (default: paper)",
    )
    parser.add_argument(
        "--allow-incomplete", action="store_true", help="draw unfinished runs too, marked as such"
    )
    return parser


def resnet_arguments(description: str | None) -> argparse.ArgumentParser:
    """``plot_arguments``, and where else the ResNet's records may be, and which of them to draw."""
    parser = plot_arguments(description)
    parser.add_argument(
        "--reference",
        type=Path,
        default="results",
        help="directory of the committed records; may be missing",
    )
    parser.add_argument(
        "--scale", choices=SCALES, help="of the ResNet (default: the first with all four optimizers)"
    )
    return parser


def read_records(arguments: argparse.Namespace, problem: str) -> Runs:
    """The records the arguments ask for; exits with a message if there are none to draw."""
    with readable():
        return load_runs(
            arguments.records,
            problem,
            variant=arguments.variant,
            allow_incomplete=arguments.allow_incomplete,
        )


def read_resnet(arguments: argparse.Namespace) -> tuple[Panel, Runs | None]:
    """The ResNet's panel, and its controls if there are any.

    Raises:
        NoRecordsError: there is none to draw, here or committed.
        RecordError: one is damaged.
    """
    asked = partial(load_runs, variant=arguments.variant, allow_incomplete=arguments.allow_incomplete)

    def read(root: Path, problem: str) -> Runs:
        return (asked if root == arguments.records else load_runs)(root, problem)

    found = find_resnet(read, arguments.records, arguments.reference, arguments.scale)
    controls = runs_if_any(found.root, found.scale.problem, CONTROL)
    wanted = SCALES[arguments.scale].problem if arguments.scale else found.scale.problem
    if (found.root, found.scale.problem) != (arguments.records, wanted):
        print(f"{wanted}: nothing to draw in {arguments.records}; drawn: {found.root / found.scale.problem}")
    note = "" if found.root == arguments.records else "committed records"
    return Panel(found.scale.title, found.runs, note), controls


def runs_if_any(root: Path, problem: str, variant: str = PAPER) -> Runs | None:
    """As ``load_runs``; None if there are none."""
    try:
        return load_runs(root, problem, variant=variant)
    except NoRecordsError:
        return None


def save_markdown(text: str, directory: Path, name: str) -> Path:
    """Print the numbers behind a figure, and write them beside it."""
    path = directory / f"{name}.md"
    path.write_text(text, encoding="utf-8")
    print(text)
    return path


def say_written(*paths: Path) -> None:
    print("wrote", ", ".join(map(str, paths)))
