import math
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from experiments.figures import (
    Panel,
    accuracy_figure,
    figure1,
    figure1_seconds,
    load_runs,
    save_figure,
)
from experiments.figures.curves import Runs
from experiments.figures.style import OPTIMIZERS, optimizer_styles

PROBLEM = "deep_linear_mlp"


def legend(axes: Axes) -> list[str]:
    drawn = axes.get_legend()
    assert drawn is not None
    return [text.get_text() for text in drawn.get_texts()]


@pytest.fixture
def runs(write_all: Callable[..., None], tmp_path: Path) -> Runs:
    write_all(epochs=10)
    return load_runs(tmp_path / "runs", PROBLEM)


def test_figure1(runs: Runs) -> None:
    (axes,) = figure1([Panel("MLP", runs)]).axes
    assert (axes.get_yscale(), axes.get_xscale()) == ("log", "linear")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "training loss")
    assert axes.get_title() == "MLP"
    assert legend(axes) == [style.label for style in OPTIMIZERS.values()]
    assert len(axes.lines) == len(axes.collections) == 4
    line = axes.lines[2]
    assert line.get_color() == OPTIMIZERS["kfac"].color
    losses = runs["kfac"].table("train_loss")
    assert np.asarray(line.get_xdata()).tolist() == list(range(1, 11))
    geometric_mean = losses.prod(axis=1) ** (1 / 5)
    assert np.asarray(line.get_ydata()) == pytest.approx(geometric_mean.to_numpy())


def test_figure1_has_a_panel_per_experiment(runs: Runs) -> None:
    figure = figure1([Panel("MLP", runs), Panel("ResNet110", runs)])
    assert [axes.get_title() for axes in figure.axes] == ["MLP", "ResNet110"]


def test_figure1_seconds(runs: Runs) -> None:
    (axes,) = figure1_seconds([Panel("MLP", runs)]).axes
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel() == "wall-clock time of 5 seeds side by side [s]"
    assert axes.get_title() == "MLP (cpu, 1 thread)"
    assert np.asarray(axes.lines[2].get_xdata()) == pytest.approx(np.arange(1, 11))


def test_accuracy_figure(runs: Runs) -> None:
    axes = accuracy_figure(Panel("MLP", runs)).axes
    assert [a.get_ylabel() for a in axes] == ["training accuracy", "test accuracy"]
    assert [a.get_yscale() for a in axes] == ["linear", "linear"]
    sgd = runs["sgd"].table("test_accuracy").mean(axis=1).to_numpy()
    assert np.asarray(axes[1].lines[0].get_ydata()) == pytest.approx(sgd)


def test_diverged_seeds_are_counted_in_every_legend(
    write_record: Callable[..., Path], tmp_path: Path
) -> None:
    def diverge(curves: pd.DataFrame) -> None:
        curves.loc[(curves["seed"] < 2) & (curves["epoch"] > 5), "train_loss"] = math.nan

    write_record("two_level_kfac", epochs=10, edit=diverge)
    panel = Panel("MLP", load_runs(tmp_path / "runs", PROBLEM))
    for figure in (figure1([panel]), figure1_seconds([panel]), accuracy_figure(panel)):
        for axes in figure.axes:
            assert legend(axes) == ["two-level K-FAC (2 of 5 seeds diverged)"]
            assert np.isfinite(np.asarray(axes.lines[0].get_ydata(), dtype=float)).all()


def test_all_seeds_diverged_at_once_still_draws(write_record: Callable[..., Path], tmp_path: Path) -> None:
    def diverge(curves: pd.DataFrame) -> None:
        curves["train_loss"] = math.nan

    write_record("sgd", epochs=3, edit=diverge)
    panel = Panel("MLP", load_runs(tmp_path / "runs", PROBLEM))
    for figure in (figure1([panel]), figure1_seconds([panel]), accuracy_figure(panel)):
        assert legend(figure.axes[0]) == ["SGD (5 of 5 seeds diverged)"]
        save_figure(figure, tmp_path, "diverged")


@pytest.mark.filterwarnings("ignore:skipped unfinished")
def test_the_face_says_what_the_records_are(write_record: Callable[..., Path], tmp_path: Path) -> None:
    write_record("sgd", epochs=3, label="preview")
    runs = load_runs(tmp_path / "runs", PROBLEM)
    for figure in (figure1([Panel("MLP", runs)]), accuracy_figure(Panel("MLP", runs))):
        assert figure.axes[0].get_title() == "MLP\npreview"
    write_record("adam", epochs=3, complete=False)
    runs = load_runs(tmp_path / "runs", PROBLEM, allow_incomplete=True)
    (axes,) = figure1([Panel("MLP", runs)]).axes
    assert axes.get_title() == "MLP\nSGD: preview; Adam: incomplete"


def test_one_seed_is_a_line_without_a_band(write_record: Callable[..., Path], tmp_path: Path) -> None:
    write_record("sgd", epochs=3, seeds=[7])
    figure = figure1([Panel("MLP", load_runs(tmp_path / "runs", PROBLEM))])
    (line,) = figure.axes[0].lines
    assert np.isfinite(np.asarray(line.get_ydata(), dtype=float)).all()
    save_figure(figure, tmp_path, "single")


def test_unknown_optimizers_get_their_own_colour() -> None:
    styles = optimizer_styles(["shampoo", "two_level_kfac", "sgd", "muon"])
    assert list(styles) == ["sgd", "two_level_kfac", "muon", "shampoo"]
    assert len({style.color for style in styles.values()}) == 4
    assert len(optimizer_styles(str(number) for number in range(20))) == 20


def test_text_is_readable_at_column_width(runs: Runs) -> None:
    figure = figure1([Panel("MLP", runs)])
    (axes,) = figure.axes
    drawn = axes.get_legend()
    assert drawn is not None
    texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *drawn.get_texts()]
    texts += axes.get_xticklabels() + axes.get_yticklabels()
    assert min(float(text.get_fontsize()) for text in texts) >= 7
    assert figure.get_size_inches()[0] == pytest.approx(3.3)


def test_saved_bytes_are_the_same_every_time(runs: Runs, tmp_path: Path) -> None:
    once = save_figure(figure1([Panel("MLP", runs)]), tmp_path / "once", "figure1")
    again = save_figure(figure1([Panel("MLP", runs)]), tmp_path / "again", "figure1")
    assert [path.name for path in once] == ["figure1.pdf", "figure1.png"]
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]
    assert b"CreationDate" not in once[0].read_bytes()


def test_a_new_figure_is_one_short_script(
    write_record: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_record("kfac", epochs=4)
    write_record("kfac", variant="damping=0.001", epochs=4)
    script = Path(__file__).with_name("a_figure_of_ones_own.py")
    assert len(script.read_text().splitlines()) <= 20
    monkeypatch.setattr("sys.argv", [str(script), str(tmp_path / "runs"), str(tmp_path / "drawn")])
    figure = runpy.run_path(str(script))["figure"]
    assert legend(figure.axes[1]) == ["damping=0.001", "paper"]
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {"one_level.pdf", "one_level.png"}
