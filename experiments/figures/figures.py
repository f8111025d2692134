"""The paper's figures, from tables of records."""

import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import curves
from experiments.figures.style import PANEL_SIZE, RC, Style, optimizer_styles

TITLE_WIDTH = 45  # characters that fit above one panel


class Panel(NamedTuple):
    """One experiment: the title of its panel, its records as ``load_records`` returns them, and what
    else its face must say."""

    title: str
    frame: pd.DataFrame
    note: str = ""

    @property
    def remarks(self) -> str:
        """All that must be said of these numbers wherever they are shown."""
        return "; ".join(filter(None, (curves.remarks(self.frame), self.note)))


def figure1(panels: Sequence[Panel]) -> Figure:
    """Training loss against epochs, one panel per experiment (the paper's Figure 1)."""
    styles = _common_styles(panels)

    def draw(axes: Axes, panel: Panel) -> None:
        curves.loss_against_epochs(axes, panel.frame, styles=styles)
        set_title(axes, panel.title, panel.remarks)

    return _figure([partial(draw, panel=panel) for panel in panels])


def figure1_seconds(panels: Sequence[Panel]) -> Figure:
    """Training loss against wall-clock seconds, one panel per experiment."""
    styles = _common_styles(panels)

    def draw(axes: Axes, panel: Panel) -> None:
        curves.loss_against_seconds(axes, panel.frame, styles=styles)
        title = f"{panel.title} ({curves.machines(panel.frame)})"
        set_title(axes, title, panel.remarks)

    return _figure([partial(draw, panel=panel) for panel in panels])


def accuracy_figure(panel: Panel) -> Figure:
    """Training and test accuracy against epochs of one experiment (the paper's Figure 2, or 3)."""

    def draw(axes: Axes, metric: str) -> None:
        curves.accuracy_against_epochs(axes, panel.frame, metric)
        set_title(axes, panel.title, panel.remarks)

    return _figure([partial(draw, metric=m) for m in ("train_accuracy", "test_accuracy")])


def save_figure(figure: Figure, directory: str | Path, name: str) -> list[Path]:
    """Write ``<name>.pdf`` and ``<name>.png``; the same figure gives the same bytes at any time."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        path = directory / f"{name}.{suffix}"
        with matplotlib.rc_context(RC):
            figure.savefig(path, metadata=metadata)
        paths.append(path)
    return paths


def _figure(draw_panels: Sequence[Callable[[Axes], None]]) -> Figure:
    width, height = PANEL_SIZE
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(width * len(draw_panels), height), layout="constrained")
        row = figure.subplots(1, len(draw_panels), squeeze=False)[0]
        for axes, draw in zip(row, draw_panels, strict=True):
            draw(axes)
    return figure


def _common_styles(panels: Sequence[Panel]) -> dict[str, Style]:
    return optimizer_styles(name for panel in panels for name in panel.frame["optimizer"])


def set_title(axes: Axes, *lines: str) -> None:
    wrapped = (textwrap.fill(line, TITLE_WIDTH, break_on_hyphens=False) for line in lines if line)
    axes.set_title("\n".join(wrapped))
