"""Figures and tables from the records of training: DataFrame in, Figure out."""

from experiments.figures.curves import accuracy_against_epochs, loss_against_epochs, loss_against_seconds
from experiments.figures.figures import Panel, accuracy_figure, figure1, figure1_seconds, save_figure
from experiments.figures.finals import final_markdown, final_table, order_table
from experiments.figures.grid import (
    Point,
    Winner,
    grid_markdown,
    grid_table,
    read_grid_table,
    winners,
    winners_frame,
)
from experiments.figures.long_table import by_optimizer, load_records
from experiments.figures.sensitivity import sensitivity_figure
from experiments.figures.statistics import (
    final_losses,
    paired_difference,
    paired_ratio,
    seed_interval,
    seed_median,
    seed_table,
)
from experiments.figures.summary import Summary, summarize
from experiments.records import NoRecordsError, Record, RecordError, load_record

__all__ = [
    "NoRecordsError",
    "Panel",
    "Point",
    "Record",
    "RecordError",
    "Summary",
    "Winner",
    "accuracy_against_epochs",
    "accuracy_figure",
    "by_optimizer",
    "figure1",
    "figure1_seconds",
    "final_losses",
    "final_markdown",
    "final_table",
    "grid_markdown",
    "grid_table",
    "load_record",
    "load_records",
    "loss_against_epochs",
    "loss_against_seconds",
    "order_table",
    "paired_difference",
    "paired_ratio",
    "read_grid_table",
    "save_figure",
    "seed_interval",
    "seed_median",
    "seed_table",
    "sensitivity_figure",
    "summarize",
    "winners",
    "winners_frame",
]
