"""Draw Figure 1, training loss against epochs and seconds, and compare it with the committed."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from kfac2.figures import (
    NoRecordsError,
    Panel,
    RecordError,
    figure1,
    figure1_seconds,
    load_records,
    save_figure,
    summarize,
)
from kfac2.figures.arguments import plot_arguments, read_records

PROBLEM = "deep_linear_mlp"
TITLE = "64-layer linear MLP"


def main(argv: Sequence[str] | None = None) -> None:
    parser = plot_arguments(__doc__)
    parser.add_argument(
        "--reference",
        type=Path,
        default="results",
        help="directory of the committed records to compare with; may be missing",
    )
    arguments = parser.parse_args(argv)
    frame = read_records(arguments, PROBLEM)
    is_reference = arguments.reference.resolve() == arguments.records.resolve()
    reference = None if is_reference else read_reference(arguments.reference)

    panels = [Panel(TITLE, frame)]
    paths = save_figure(figure1(panels), arguments.output, "figure1")
    paths += save_figure(figure1_seconds(panels), arguments.output, "figure1_seconds")
    summary = summarize(frame, reference, is_reference=is_reference)
    table = arguments.output / "figure1.md"
    table.write_text(summary.markdown, encoding="utf-8")
    print(summary.markdown)
    print("wrote", ", ".join(str(path) for path in [*paths, table]))


def read_reference(reference: Path) -> pd.DataFrame | None:
    """The committed records; None if there are none."""
    try:
        return load_records(reference, PROBLEM)
    except NoRecordsError:
        return None
    except RecordError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
