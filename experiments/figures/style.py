"""How an optimizer looks in every figure: its name, colour and line style."""

from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import Any, NamedTuple


class Style(NamedTuple):
    label: str
    color: str
    linestyle: str


# Colours: Okabe and Ito's palette, told apart with every common colour blindness. The line styles
# tell the curves apart in black and white.
OPTIMIZERS: Mapping[str, Style] = {
    "sgd": Style("SGD", "#56B4E9", ":"),
    "adam": Style("Adam", "#E69F00", "-."),
    "kfac": Style("K-FAC (one level)", "#0072B2", "--"),
    "two_level_kfac": Style("two-level K-FAC", "#D55E00", "-"),
}
OTHER_COLORS = ("#009E73", "#CC79A7", "#000000", "#F0E442")

# Matplotlib settings for a figure printed at its own size, one column (3.3 inches) per panel.
PANEL_SIZE = (3.3, 3.1)
RC: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "lines.linewidth": 1.2,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.4,
    "pdf.fonttype": 42,  # text stays text
    "savefig.dpi": 300,
}


def optimizer_styles(names: Iterable[str]) -> dict[str, Style]:
    """Styles by optimizer, in the order of the legend: the paper's four, then others by name."""
    names = set(names)
    known = {name: style for name, style in OPTIMIZERS.items() if name in names}
    others = sorted(names - set(OPTIMIZERS))
    return known | {
        name: Style(name, color, "-") for name, color in zip(others, cycle(OTHER_COLORS), strict=False)
    }
