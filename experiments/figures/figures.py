"""The paper's figures, and what every figure is made with: ``panels`` in the house's style, titles, files."""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import curves
from experiments.figures.curves import Runs
from experiments.figures.style import PANEL_SIZE, RC, Style, optimizer_styles
from experiments.records.files import write_atomically

TITLE_WIDTH = 45  # characters that fit above one panel


class Panel(NamedTuple):
    """One experiment: the title of its panel, its runs by optimizer, and what else its face must say."""

    title: str
    runs: Runs
    note: str = ""

    @property
    def remarks(self) -> str:
        """All that must be said of these numbers wherever they are shown."""
        return "; ".join(filter(None, (curves.remarks(self.runs), self.note)))


@contextmanager
def panels(
    rows: int, columns: int, stretch: tuple[float, float] = (1, 1), **options: Any
) -> Iterator[tuple[Figure, Any]]:
    """A figure and its axes, ``(rows, columns)``, to be drawn in this context, which owns the style.

    ``stretch``: how many times as wide and as high as usual a panel is; ``options`` of ``Figure.subplots``.
    """
    width, height = PANEL_SIZE
    with matplotlib.rc_context(RC):
        size = (columns * stretch[0] * width, rows * stretch[1] * height)
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, **options)


def figure1(experiments: Sequence[Panel]) -> Figure:
    """Training loss against epochs, one panel per experiment (the paper's Figure 1)."""
    with panels(1, len(experiments)) as (figure, (row,)):
        for axes, panel in zip(row, experiments, strict=True):
            curves.loss_against_epochs(axes, panel.runs, styles=_common_styles(experiments))
            set_title(axes, panel.title, panel.remarks)
    return figure


def figure1_seconds(experiments: Sequence[Panel]) -> Figure:
    """Training loss against wall-clock seconds, one panel per experiment."""
    with panels(1, len(experiments)) as (figure, (row,)):
        for axes, panel in zip(row, experiments, strict=True):
            curves.loss_against_seconds(axes, panel.runs, styles=_common_styles(experiments))
            set_title(axes, f"{panel.title} ({curves.machines(panel.runs)})", panel.remarks)
    return figure


def accuracy_figure(panel: Panel) -> Figure:
    """Training and test accuracy against epochs of one experiment (the paper's Figure 2, or 3)."""
    with panels(1, 2) as (figure, (row,)):
        for axes, metric in zip(row, ("train_accuracy", "test_accuracy"), strict=True):
            curves.accuracy_against_epochs(axes, panel.runs, metric)
            set_title(axes, panel.title, panel.remarks)
    return figure


def set_title(axes: Axes, *lines: str) -> None:
    wrapped = (textwrap.fill(line, TITLE_WIDTH, break_on_hyphens=False) for line in lines if line)
    axes.set_title("\n".join(wrapped))


def save_figure(figure: Figure, directory: str | Path, name: str) -> list[Path]:
    """Write ``<name>.pdf`` and ``<name>.png``; the same figure gives the same bytes at any time."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        path = directory / f"{name}.{suffix}"
        with matplotlib.rc_context(RC):
            write_atomically(path, partial(figure.savefig, format=suffix, metadata=metadata))
        paths.append(path)
    return paths


def _common_styles(experiments: Sequence[Panel]) -> dict[str, Style]:
    return optimizer_styles(name for panel in experiments for name in panel.runs)
