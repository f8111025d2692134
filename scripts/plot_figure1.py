"""Draw Figure 1, training loss against epochs and seconds, with the numbers behind it.

Left the deep linear MLP, compared with the committed records; right the ResNet, if there are records.
"""

from collections.abc import Sequence

from experiments.figures import (
    NoRecordsError,
    Panel,
    figure1,
    figure1_seconds,
    final_markdown,
    save_figure,
    summary_markdown,
)
from experiments.figures.arguments import (
    read_records,
    read_resnet,
    readable,
    resnet_arguments,
    runs_if_any,
    save_markdown,
    say_written,
)
from experiments.figures.scales import MLP


@readable()
def main(argv: Sequence[str] | None = None) -> None:
    arguments = resnet_arguments(__doc__).parse_args(argv)
    runs = read_records(arguments, MLP.problem)
    is_reference = arguments.reference.resolve() == arguments.records.resolve()
    reference = None if is_reference else runs_if_any(arguments.reference, MLP.problem)

    panels = [Panel(MLP.title, runs)]
    markdown = f"## {MLP.title}\n\n{summary_markdown(runs, reference, is_reference)}"
    try:
        resnet, controls = read_resnet(arguments)
        panels.append(resnet)
        markdown += f"\n{final_markdown(resnet, controls)}"
    except NoRecordsError as error:
        print(f"Figure 1 without its right panel: {error}")

    paths = save_figure(figure1(panels), arguments.output, "figure1")
    paths += save_figure(figure1_seconds(panels), arguments.output, "figure1_seconds")
    say_written(*paths, save_markdown(markdown, arguments.output, "figure1"))


if __name__ == "__main__":
    main()
