"""Draw Figure 1, training loss against epochs and seconds, with the numbers behind it.

Left the deep linear MLP, compared with the committed records; right the ResNet, if there are records.
"""

from collections.abc import Sequence
from pathlib import Path

from experiments.figures import (
    NoRecordsError,
    Panel,
    RecordError,
    figure1,
    figure1_seconds,
    final_markdown,
    load_runs,
    save_figure,
    summarize,
)
from experiments.figures.arguments import add_resnet_arguments, plot_arguments, read_records, read_resnet
from experiments.figures.curves import Runs

PROBLEM = "deep_linear_mlp"
TITLE = "64-layer linear MLP"


def main(argv: Sequence[str] | None = None) -> None:
    parser = plot_arguments(__doc__)
    add_resnet_arguments(parser)
    arguments = parser.parse_args(argv)
    runs = read_records(arguments, PROBLEM)
    is_reference = arguments.reference.resolve() == arguments.records.resolve()
    reference = None if is_reference else read_reference(arguments.reference)

    panels = [Panel(TITLE, runs)]
    markdown = f"## {TITLE}\n\n{summarize(runs, reference, is_reference=is_reference).markdown}"
    try:
        resnet, controls = read_resnet(arguments)
        panels.append(resnet)
        markdown += f"\n{final_markdown(resnet, controls)}"
    except NoRecordsError as error:
        print(f"Figure 1 without its right panel: {error}")

    paths = save_figure(figure1(panels), arguments.output, "figure1")
    paths += save_figure(figure1_seconds(panels), arguments.output, "figure1_seconds")
    table = arguments.output / "figure1.md"
    table.write_text(markdown, encoding="utf-8")
    print(markdown)
    print("wrote", ", ".join(str(path) for path in [*paths, table]))


def read_reference(reference: Path) -> Runs | None:
    """The committed records; None if there are none."""
    try:
        return load_runs(reference, PROBLEM)
    except NoRecordsError:
        return None
    except RecordError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
