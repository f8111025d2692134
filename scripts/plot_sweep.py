"""Draw a sweep from its table and records: each optimizer at its best beside the paper's settings, and
the final loss against the learning rate. The table is that of experiments.select."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from experiments.figures import NoRecordsError, Panel, RecordError, figure1, load_runs, save_figure
from experiments.figures.grid import read_grid_table, winning_runs
from experiments.figures.sensitivity import sensitivity_figure

TITLES = {"deep_linear_mlp": "64-layer linear MLP"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=Path, default="runs", help="directory of the records and the table")
    parser.add_argument("--output", type=Path, default="figures", help="directory of the figures")
    parser.add_argument("--problem", default="deep_linear_mlp")
    parser.add_argument("--sweep", default="paper_grid")
    arguments = parser.parse_args(argv)
    problem, sweep = str(arguments.problem), str(arguments.sweep)
    table = read_table(arguments.records / problem / f"{sweep}.csv")
    title = TITLES.get(problem) or problem
    try:
        best = Panel(f"{title}, best of the grid", winning_runs(arguments.records, problem, table))
    except RecordError as error:
        raise SystemExit(f"error: {error}") from None
    panels = [best]
    try:
        panels.insert(0, Panel(f"{title}, the paper's settings", load_runs(arguments.records, problem)))
    except NoRecordsError as error:
        print(f"without the paper's settings: {error}")
    except RecordError as error:
        raise SystemExit(f"error: {error}") from None
    figure = figure1(panels)
    limits = [limit for axes in figure.axes for limit in axes.get_ylim()]
    for axes in figure.axes:  # one problem: one scale
        axes.set_ylim(min(limits), max(limits))
    paths = save_figure(figure, arguments.output, f"{sweep}_best")
    paths += save_figure(sensitivity_figure(table, title), arguments.output, f"{sweep}_sensitivity")
    print("wrote", ", ".join(map(str, paths)))


def read_table(path: Path) -> pd.DataFrame:
    try:
        table = read_grid_table(path)
    except RecordError as error:
        raise SystemExit(f"error: {error}") from None
    if "lr" not in table:
        raise SystemExit(f"error: {path} has no column lr: only sweeps of the learning rate are drawn")
    return table


if __name__ == "__main__":
    main()
