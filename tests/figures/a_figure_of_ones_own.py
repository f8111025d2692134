"""All trainings by one level beside each other: python a_figure_of_ones_own.py RECORDS OUTPUT"""

import sys

from experiments.figures import loss_against_epochs, panels, save_figure, set_title
from experiments.records import find_runs

records, output = sys.argv[1:]
runs = {run.variant: run for run in find_runs(records, "deep_linear_mlp", optimizer="kfac")}
with panels(1, 2) as (figure, ((training, test),)):
    loss_against_epochs(training, runs)
    loss_against_epochs(test, runs, "test_loss")
    set_title(training, "K-FAC (one level)", *runs["paper"].labels)
save_figure(figure, output, "one_level")
