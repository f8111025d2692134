"""Draw Figure 2: training and test accuracy of the deep linear MLP."""

from collections.abc import Sequence

from experiments.figures import Panel, accuracy_figure, save_figure
from experiments.figures.arguments import plot_arguments, read_records


def main(argv: Sequence[str] | None = None) -> None:
    arguments = plot_arguments(__doc__).parse_args(argv)
    runs = read_records(arguments, "deep_linear_mlp")
    panel = Panel("64-layer linear MLP", runs)
    paths = save_figure(accuracy_figure(panel), arguments.output, "figure2")
    print("wrote", ", ".join(str(path) for path in paths))


if __name__ == "__main__":
    main()
