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
from experiments.figures.finals import final_markdown
from experiments.figures.grid import read_grid_table, winning_runs
from experiments.figures.sensitivity import sensitivity_figure
from experiments.figures.statistics import paired_difference, paired_ratio
from experiments.figures.summary import summary_markdown
from experiments.records import NoRecordsError, RecordError, Run, load_runs
