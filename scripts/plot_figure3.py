"""Draw Figure 3, training and test accuracy of the ResNet, with the numbers behind it."""

from collections.abc import Sequence

from experiments.figures import accuracy_figure, final_markdown, save_figure
from experiments.figures.arguments import read_resnet, readable, resnet_arguments, save_markdown, say_written


@readable()
def main(argv: Sequence[str] | None = None) -> None:
    arguments = resnet_arguments(__doc__).parse_args(argv)
    panel, controls = read_resnet(arguments)
    paths = save_figure(accuracy_figure(panel), arguments.output, "figure3")
    text = final_markdown(panel, controls)
    say_written(*paths, save_markdown(text, arguments.output, "figure3"))


if __name__ == "__main__":
    main()
