"""Figures and tables from the records of training: runs in, Figure out."""

from experiments.figures.curves import accuracy_against_epochs, loss_against_epochs, loss_against_seconds
from experiments.figures.figures import (
    Panel,
    accuracy_figure,
    figure1,
    figure1_seconds,
    panels,
    save_figure,
    set_title,
)
from experiments.figures.finals import final_markdown, final_table, order_table
from experiments.figures.grid import (
    Point,
    Winner,
    grid_markdown,
    grid_table,
    read_grid_table,
    winners,
    winning_runs,
)
from experiments.figures.sensitivity import sensitivity_figure
from experiments.figures.statistics import (
    paired_difference,
    paired_ratio,
    seed_interval,
    seed_median,
)
from experiments.figures.summary import Summary, summarize
from experiments.records import NoRecordsError, Record, RecordError, Run, load_record, load_runs

__all__ = [
    "NoRecordsError",
    "Panel",
    "Point",
    "Record",
    "RecordError",
    "Run",
    "Summary",
    "Winner",
    "accuracy_against_epochs",
    "accuracy_figure",
    "figure1",
    "figure1_seconds",
    "final_markdown",
    "final_table",
    "grid_markdown",
    "grid_table",
    "load_record",
    "load_runs",
    "loss_against_epochs",
    "loss_against_seconds",
    "order_table",
    "paired_difference",
    "paired_ratio",
    "panels",
    "read_grid_table",
    "save_figure",
    "seed_interval",
    "seed_median",
    "sensitivity_figure",
    "set_title",
    "summarize",
    "winners",
    "winning_runs",
]
