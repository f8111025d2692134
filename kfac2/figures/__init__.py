"""Figures and tables from the records of training: DataFrame in, Figure out."""

from kfac2.figures.curves import accuracy_against_epochs, loss_against_epochs, loss_against_seconds
from kfac2.figures.figures import Panel, figure1, figure1_seconds, figure2, save_figure
from kfac2.figures.records import (
    NoRecordsError,
    Record,
    RecordError,
    by_optimizer,
    load_record,
    load_records,
)
from kfac2.figures.statistics import seed_interval, seed_median, seed_table
from kfac2.figures.summary import Summary, summarize

__all__ = [
    "NoRecordsError",
    "Panel",
    "Record",
    "RecordError",
    "Summary",
    "accuracy_against_epochs",
    "by_optimizer",
    "figure1",
    "figure1_seconds",
    "figure2",
    "load_record",
    "load_records",
    "loss_against_epochs",
    "loss_against_seconds",
    "save_figure",
    "seed_interval",
    "seed_median",
    "seed_table",
    "summarize",
]
