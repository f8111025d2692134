"""The upper bound's figure: each direction's losses, and what blocks do beside the whole in function space."""

from collections.abc import Mapping
from contextlib import suppress

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.figures.curves import add_legend, plain_log
from experiments.figures.figures import panels, set_title
from experiments.figures.scales import MLP
from experiments.figures.statistics import final_summary
from experiments.figures.study.drawing import NORMAL
from experiments.figures.study.records import Study
from experiments.figures.study.upper_bound import SHAPE, best
from experiments.figures.style import Style
from experiments.records import FULL_BATCH_LOSS, NoRecordsError, Run
from experiments.study.decision import (
    BLOCKS,
    CORRECTED,
    DEEP_LINEAR,
    EXACT,
    LAYER_NORM,
    SELECTION,
    WHOLE,
    Net,
)

LOOKS = {
    name: Style(name.replace("_", " "), color, line)
    for name, color, line in zip(
        (WHOLE, BLOCKS, *CORRECTED),
        ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#000000", "#E69F00"),
        ("-", "--", "-.", ":", "-.", ":"),
        strict=True,
    )
}
TITLES = {DEEP_LINEAR: MLP.title, LAYER_NORM: "8-layer ReLU MLP with layer norm"}
HEADINGS = dict(zip(SHAPE, ("cosine of blocks and whole", "length, blocks / whole"), strict=True))
OVER_SEEDS = f"median and range over {len(SELECTION)} seeds"


def upper_bound_figure(study: Study) -> Figure:
    """A row for each net: full-batch losses of the directions at their best of the last epoch, on the seeds that
    choose, and along the whole one's and the blocks' training the cosine and the length ratio in function space.

    Raises:
        NoRecordsError: no direction is trained at all of its settings.
    """
    nets = {net: runs for net in EXACT if (runs := _chosen(study, net))}
    if not nets:
        raise NoRecordsError("no direction of the exact natural gradient is trained at all of its settings")
    with panels(len(nets), 1 + len(SHAPE), NORMAL) as (figure, rows):
        for (net, runs), (loss, *shape) in zip(nets.items(), rows, strict=True):
            _draw_losses(loss, runs)
            for axes, (name, heading) in zip(shape, HEADINGS.items(), strict=True):
                for along in (each for each in (WHOLE, BLOCKS) if each in runs):
                    table = runs[along].of_seeds(SELECTION).table(name).T.agg(["median", "min", "max"]).T
                    _draw_range(axes, table, LOOKS[along]._replace(label=f"along {LOOKS[along].label}"))
                axes.set_ylabel(heading)
                add_legend(axes, OVER_SEEDS, columns=1)
            set_title(loss, TITLES[net], f"each at its best of epoch {net.epochs[-1]}")
            set_title(shape[0], "directions in function space")
    return figure


def _chosen(study: Study, net: Net) -> dict[str, Run]:
    """Of the directions that are trained, each at its best of the last epoch."""
    found = {}
    for name, grid in EXACT[net].items():
        with suppress(NoRecordsError):
            found[name] = study.run(grid[best(study, net, name, net.epochs[-1])])
    return found


def _draw_losses(axes: Axes, runs: Mapping[str, Run]) -> None:
    for name, run in runs.items():
        recorded = run.curves.loc[run.curves[FULL_BATCH_LOSS].notna(), "epoch"].unique()
        summaries = {epoch: final_summary(run.full_batch_losses(epoch)) for epoch in recorded}
        _draw_range(axes, pd.DataFrame(summaries).T.loc[:, ["median", "lowest", "highest"]], LOOKS[name])
    plain_log(axes, "y")
    axes.set_ylim(top=min(1, axes.get_ylim()[1]))  # what explodes leaves the panel
    axes.set_ylabel("full-batch training loss")
    add_legend(axes, OVER_SEEDS, columns=2)


def _draw_range(axes: Axes, table: pd.DataFrame, style: Style) -> None:
    """Against epochs, the columns being a line and the ends of a band."""
    middle, low, high = (table[name] for name in table)
    axes.plot(table.index, middle, color=style.color, linestyle=style.linestyle, label=style.label)
    axes.fill_between(table.index, low, high, color=style.color, alpha=0.15)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
