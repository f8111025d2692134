"""Draw Figure 2: training and test accuracy of the deep linear MLP."""

from collections.abc import Sequence

from experiments.figures import Panel, accuracy_figure, save_figure
from experiments.figures.arguments import plot_arguments, read_records, say_written
from experiments.figures.scales import MLP


def main(argv: Sequence[str] | None = None) -> None:
    arguments = plot_arguments(__doc__).parse_args(argv)
    panel = Panel(MLP.title, read_records(arguments, MLP.problem))
    say_written(*save_figure(accuracy_figure(panel), arguments.output, "figure2"))


if __name__ == "__main__":
    main()
