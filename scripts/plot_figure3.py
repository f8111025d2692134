"""Draw Figure 3, training and test accuracy of the ResNet, with the numbers behind it."""

from collections.abc import Sequence

from experiments.figures import accuracy_figure, final_markdown, save_figure
from experiments.figures.arguments import read_resnet, readable, resnet_arguments, say_written


@readable()
def main(argv: Sequence[str] | None = None) -> None:
    arguments = resnet_arguments(__doc__).parse_args(argv)
    panel, controls = read_resnet(arguments)
    paths = save_figure(accuracy_figure(panel), arguments.output, "figure3")
    say_written(paths, arguments.output / "figure3.md", final_markdown(panel, controls))


if __name__ == "__main__":
    main()
