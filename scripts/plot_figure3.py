"""Draw Figure 3, training and test accuracy of the ResNet, with the numbers behind it."""

from collections.abc import Sequence

from experiments.figures import NoRecordsError, accuracy_figure, final_markdown, save_figure
from experiments.figures.arguments import add_resnet_arguments, plot_arguments, read_resnet


def main(argv: Sequence[str] | None = None) -> None:
    parser = plot_arguments(__doc__)
    add_resnet_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        panel, controls = read_resnet(arguments)
    except NoRecordsError as error:
        raise SystemExit(f"error: {error}") from None
    paths = save_figure(accuracy_figure(panel), arguments.output, "figure3")
    table = arguments.output / "figure3.md"
    markdown = final_markdown(panel, controls)
    table.write_text(markdown, encoding="utf-8")
    print(markdown)
    print("wrote", ", ".join(str(path) for path in [*paths, table]))


if __name__ == "__main__":
    main()
