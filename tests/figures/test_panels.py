import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

from experiments.figures import Panel, Run, accuracy_figure, figure1, figure1_seconds, load_runs, save_figure
from tests.figures.conftest import edited

PREVIEW = "resnet20_cifar10_preview"
Write = Callable[..., Path]


def legend(axes: Axes) -> list[str]:
    drawn = axes.get_legend()
    assert drawn is not None
    return [text.get_text() for text in drawn.get_texts()]


@pytest.fixture
def mlp(write_all: Callable[..., None], tmp_path: Path) -> Panel:
    write_all(epochs=10)
    return Panel("MLP", load_runs(tmp_path / "runs", "deep_linear_mlp"))


@pytest.fixture
def resnet(write_all_resnets: Callable[..., None], tmp_path: Path) -> Panel:
    write_all_resnets()
    return Panel("ResNet20 / CIFAR10", load_runs(tmp_path / "runs", PREVIEW))


def test_two_panels_share_styles_and_say_what_they_are(mlp: Panel, resnet: Panel) -> None:
    left, right = figure1([mlp, resnet._replace(note="committed records")]).axes
    assert left.get_title() == "MLP"
    label = "preview: ResNet20, 5,000 images, 6 epochs; CIFAR-10 (JPEG copy); committed records"
    assert right.get_title().replace("\n", " ") == f"ResNet20 / CIFAR10 {label}"
    assert legend(left) == legend(right)
    assert [line.get_color() for line in left.lines] == [line.get_color() for line in right.lines]


def test_seconds_of_one_seed_are_the_mean_over_seeds(mlp: Panel, resnet: Panel) -> None:
    slower = {
        name: edited(run, lambda curves: curves.assign(seconds=curves["seconds"] * (1 + curves["seed"])))
        for name, run in resnet.runs.items()
    }
    left, right = figure1_seconds([mlp, resnet._replace(runs=slower)]).axes
    assert left.get_xlabel() == "wall-clock time of 5 seeds side by side [s]"
    assert right.get_xlabel() == "wall-clock time of one seed's training [s]"
    assert np.asarray(right.lines[2].get_xdata()) == pytest.approx(3 * np.arange(1, 7))


def test_the_legend_counts_seeds_where_optimizers_differ(write_resnet: Write, tmp_path: Path) -> None:
    def diverge(curves: pd.DataFrame) -> None:
        curves.loc[(curves["seed"] == 1) & (curves["epoch"] > 3), "train_loss"] = math.nan

    write_resnet("sgd", seeds=[0])
    write_resnet("adam", seeds=[0, 1])
    write_resnet("kfac", seeds=[0, 1, 2], edit=diverge)
    (axes,) = figure1([Panel("ResNet", load_runs(tmp_path / "runs", PREVIEW))]).axes
    expected = ["SGD (1 seed)", "Adam (2 seeds)", "K-FAC (one level) (1 of 3 seeds diverged)"]
    assert legend(axes) == expected
    drawn = axes.get_legend()
    assert drawn is not None
    assert drawn.get_title().get_text().splitlines()[0] == "geometric mean and 95% interval, 1 to 3 seeds"


@pytest.mark.parametrize("spread", [1.01, 5.0])
def test_the_legend_says_where_intervals_are_cut(write_resnet: Write, tmp_path: Path, spread: float) -> None:
    """Two seeds a factor of 5 apart have an interval of thousands, which would hide the curves."""

    def apart(curves: pd.DataFrame) -> None:
        curves["train_loss"] = np.where(curves["seed"] == 0, 1.0, spread)

    write_resnet("sgd", seeds=[0, 1], edit=apart)
    (axes,) = figure1([Panel("ResNet", load_runs(tmp_path / "runs", PREVIEW))]).axes
    drawn = axes.get_legend()
    assert drawn is not None
    assert ("some intervals go beyond the axis" in drawn.get_title().get_text()) == (spread > 2)
    low, high = axes.get_ylim()
    assert low < 1 < spread < high < 10


def test_seeds_with_other_labels_and_devices_are_listed(write_resnet: Write, tmp_path: Path) -> None:
    paper = write_resnet("sgd", seeds=[0], label="preview")
    write_resnet("adam", seeds=[0], label="preview")
    for seed, label in ((1, "JPEG"), (2, "preview")):
        path = write_resnet("sgd", seeds=[seed], variant="other", label=label, device=f"gpu{seed}")
        (path / f"seed={seed}").rename(paper / f"seed={seed}")
        path.rmdir()
    panel = Panel("ResNet", load_runs(tmp_path / "runs", PREVIEW))
    title = figure1_seconds([panel]).axes[0].get_title().replace("\n", " ")
    machines = "SGD: cpu, 1 thread / gpu1, 1 thread / gpu2, 1 thread; Adam: cpu, 1 thread"
    assert title == f"ResNet ({machines}) SGD: preview / JPEG; Adam: preview"


def overlap(one: Bbox, other: Bbox) -> bool:
    """Whether two boxes share more than an edge."""
    shared = Bbox.intersection(one, other)
    return shared is not None and shared.width > 0 and shared.height > 0


@pytest.mark.parametrize("kind", ["epochs", "seconds", "accuracies"])
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
def test_nothing_overlaps_or_is_cut_off(mlp: Panel, resnet: Panel, kind: str, uneven: bool) -> None:
    if uneven:  # a long face: seeds in the legend, other settings, borrowed records
        variant = Path("batch_size=128,damping=0.01,test_samples=1000")
        label = {"label": "reduced: ResNet110, 5,000 images, 15 epochs; CIFAR-10 (JPEG copy)"}
        runs = {name: run.of_seeds(range(3 if name == "sgd" else 5)) for name, run in resnet.runs.items()}
        for name, run in runs.items():
            records = [
                replace(record, path=variant / record.path.name, provenance=record.provenance | label)
                for record in run.records
            ]
            runs[name] = Run(records)
        resnet = resnet._replace(runs=runs, note="committed records")
    draw = {
        "epochs": figure1,
        "seconds": figure1_seconds,
        "accuracies": lambda panels: accuracy_figure(panels[1]),
    }
    figure = draw[kind]([mlp, resnet])
    FigureCanvasAgg(figure).draw()
    boxes = []
    for axes in figure.axes:
        drawn = axes.get_legend()
        assert drawn is not None
        parts = [axes.title, axes.xaxis.label, axes.yaxis.label, axes.patch, drawn]
        boxes += [part.get_window_extent() for part in parts]
    for one, other in itertools.combinations(boxes, 2):
        assert not overlap(one, other)
    whole = figure.bbox
    for box in boxes:
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1


def test_a_logarithmic_axis_has_plain_numbers(resnet: Panel) -> None:
    runs = {
        name: edited(run, lambda curves: curves.assign(train_loss=0.8 * curves["train_loss"] ** 0.25))
        for name, run in resnet.runs.items()
    }  # 0.4 to 0.7
    figure = figure1([resnet._replace(runs=runs)])
    FigureCanvasAgg(figure).draw()
    labels = [label.get_text() for label in figure.axes[0].yaxis.get_ticklabels(which="both")]
    assert {"0.4", "0.6"} <= set(labels)
    assert not any("$" in label for label in labels)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("extreme", [0.0, 3e38], ids=["a loss of exactly zero", "3e38"])
def test_extreme_losses_still_draw(mlp: Panel, extreme: float, tmp_path: Path) -> None:
    def edit(curves: pd.DataFrame) -> pd.DataFrame:
        changed = (curves["epoch"] > 6) & (curves["seed"] == 1)
        return curves.assign(train_loss=curves["train_loss"].mask(changed, extreme))

    runs = {"sgd": edited(mlp.runs["sgd"], edit), "kfac": mlp.runs["kfac"]}
    for figure in (figure1([mlp._replace(runs=runs)]), figure1_seconds([mlp._replace(runs=runs)])):
        save_figure(figure, tmp_path, "extreme")
        low, high = figure.axes[0].get_ylim()
        assert 0 < low < high < math.inf
