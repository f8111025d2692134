"""Draw a sweep from its table and records: each optimizer at its best beside the paper's settings, and
the final loss against the learning rate. The table is that of experiments.select."""

from collections.abc import Sequence

from experiments.figures import (
    NoRecordsError,
    Panel,
    RecordError,
    figure1,
    load_runs,
    read_grid_table,
    save_figure,
    sensitivity_figure,
    winning_runs,
)
from experiments.figures.arguments import place_arguments, readable, say_written
from experiments.figures.scales import MLP


@readable()
def main(argv: Sequence[str] | None = None) -> None:
    parser = place_arguments(__doc__)
    parser.add_argument("--problem", default=MLP.problem)
    parser.add_argument("--sweep", default="paper_grid")
    arguments = parser.parse_args(argv)
    problem, sweep = str(arguments.problem), str(arguments.sweep)
    path = arguments.records / problem / f"{sweep}.csv"
    table = read_grid_table(path)
    if "lr" not in table:
        raise RecordError(f"{path} has no column lr: only sweeps of the learning rate are drawn")
    title = MLP.title if problem == MLP.problem else problem
    panels = [Panel(f"{title}, best of the grid", winning_runs(arguments.records, problem, table))]
    try:
        panels.insert(0, Panel(f"{title}, the paper's settings", load_runs(arguments.records, problem)))
    except NoRecordsError as error:
        print(f"without the paper's settings: {error}")
    figure = figure1(panels)
    limits = [limit for axes in figure.axes for limit in axes.get_ylim()]
    for axes in figure.axes:  # one problem: one scale
        axes.set_ylim(min(limits), max(limits))
    paths = save_figure(figure, arguments.output, f"{sweep}_best")
    paths += save_figure(sensitivity_figure(table, title), arguments.output, f"{sweep}_sensitivity")
    say_written(*paths)


if __name__ == "__main__":
    main()
