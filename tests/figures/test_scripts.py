import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.figures.grid import Point, grid_table
from experiments.paper import OPTIMIZERS

ROOT = Path(__file__).parents[2]


def run_main(script: str, *arguments: str | Path) -> None:
    runpy.run_path(str(ROOT / "scripts" / script))["main"]([str(each) for each in arguments])


def run_process(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_plot_figure1(write_all: Callable[..., None], tmp_path: Path) -> None:
    write_all()
    write_all(root="results")
    places = ("--records", tmp_path / "runs", "--reference", tmp_path / "results")
    output = tmp_path / "figures"
    done = run_process("plot_figure1.py", *places, "--output", output)
    assert done.returncode == 0, done.stderr
    assert "Verdict: reproduced" in done.stdout
    assert {path.name for path in output.iterdir()} == {
        "figure1.pdf",
        "figure1.png",
        "figure1_seconds.pdf",
        "figure1_seconds.png",
        "figure1.md",
    }
    assert (output / "figure1.md").read_text() in done.stdout


def test_a_failed_reproduction_is_said_plainly(
    write_record: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record("kfac")
    write_record("two_level_kfac", edit=lambda curves: curves.update(curves[["train_loss"]] * 5))
    places = ("--records", tmp_path / "runs", "--reference", tmp_path / "absent")
    run_main("plot_figure1.py", *places, "--output", tmp_path / "figures")
    assert "Verdict: not reproduced" in capsys.readouterr().out


def test_committed_records_are_not_compared_with_themselves(
    write_all: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_all(root="results")
    places = ("--records", tmp_path / "results", "--reference", tmp_path / "results")
    run_main("plot_figure1.py", *places, "--output", tmp_path / "figures")
    out = capsys.readouterr().out
    assert "These are the committed records themselves." in out
    assert "committed median" not in out
    assert "two-level median at epoch 100 at most 0.8" in out


def test_plot_figure2(write_all: Callable[..., None], tmp_path: Path) -> None:
    write_all(variant="training.epochs=5", epochs=5)
    places = ("--records", tmp_path / "runs", "--output", tmp_path / "figures")
    run_main("plot_figure2.py", *places, "--variant", "training.epochs=5")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"figure2.pdf", "figure2.png"}


def test_plot_sweep(
    write_all: Callable[..., None], write_record: Callable[..., Path], tmp_path: Path
) -> None:
    write_all()
    write_record("kfac", variant="lr=0.01", edit=lambda curves: curves.update(curves[["train_loss"]] / 5))
    points = [Point(name, "paper", [0, 1, 2, 3, 4], {"lr": 1e-3}) for name in OPTIMIZERS]
    points.append(Point("kfac", "lr=0.01", [0, 1, 2, 3, 4], {"lr": 1e-2}))
    places = ("--records", tmp_path / "runs", "--output", tmp_path / "figures")
    with pytest.raises(SystemExit, match=r"grid\.csv does not exist; make it with: .*select sweep=grid"):
        run_main("plot_sweep.py", *places, "--sweep", "grid")
    table = grid_table(tmp_path / "runs", "deep_linear_mlp", points)
    table.to_csv(tmp_path / "runs" / "deep_linear_mlp" / "grid.csv", index=False)
    run_main("plot_sweep.py", *places, "--sweep", "grid")
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {f"grid_{name}.{suffix}" for name in ("best", "sensitivity") for suffix in ("pdf", "png")}


@pytest.fixture
def places(tmp_path: Path) -> list[str | Path]:
    roots = {"--records": "runs", "--reference": "results", "--output": "figures"}
    return [part for name, root in roots.items() for part in (name, tmp_path / root)]


@pytest.fixture
def without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the text: most of a script's time is matplotlib's."""
    monkeypatch.setattr(
        "experiments.figures.save_figure", lambda _, path, name: path.mkdir(exist_ok=True) or []
    )


def test_figure1_with_both_panels(
    write_all: Callable[..., None],
    write_all_resnets: Callable[..., None],
    write_resnet: Callable[..., Path],
    places: list[str | Path],
    tmp_path: Path,
) -> None:
    write_all()
    write_all_resnets()
    write_resnet("sgd", variant="batch_size=128")
    write_all_resnets(root="results")
    run_main("plot_figure1.py", *places, "--scale", "preview")
    left, right = (tmp_path / "figures" / "figure1.md").read_text().split("\n## ")
    assert left.startswith("## 64-layer linear MLP\n")
    assert "**Verdict: not decided.**" in left
    assert right.startswith("ResNet20 / CIFAR10\n\n**preview: ")
    assert "| SGD, batch_size=128 " in right
    assert "Verdict" not in right
    assert "committed" not in right


@pytest.mark.usefixtures("without_drawing")
def test_the_right_panel_falls_back_on_committed_records(
    write_all: Callable[..., None],
    write_all_resnets: Callable[..., None],
    places: list[str | Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_all()
    write_all_resnets(root="results", problem="resnet110_cifar10_reduced", label="reduced: 15 epochs")
    for script, table in (("plot_figure1.py", "figure1.md"), ("plot_figure3.py", "figure3.md")):
        run_main(script, *places, "--scale", "preview")
        committed = tmp_path / "results" / "resnet110_cifar10_reduced"
        expected = f"resnet20_cifar10_preview: nothing to draw in {tmp_path / 'runs'}; drawn: {committed}\n"
        assert capsys.readouterr().out.startswith(expected)
        text = (tmp_path / "figures" / table).read_text()
        assert "## ResNet110 / CIFAR10\n\n**reduced: 15 epochs; committed records**\n" in text


@pytest.mark.usefixtures("without_drawing")
@pytest.mark.filterwarnings("ignore:skipped unfinished")
def test_the_left_panel_alone(
    write_all: Callable[..., None],
    write_resnet: Callable[..., Path],
    places: list[str | Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_all()
    write_resnet("sgd", complete=False)
    run_main("plot_figure1.py", *places, "--scale", "preview")
    assert capsys.readouterr().out.startswith("Figure 1 without its right panel: no finished records in ")
    assert "ResNet" not in (tmp_path / "figures" / "figure1.md").read_text()
    run_main("plot_figure1.py", *places, "--scale", "preview", "--allow-incomplete")
    assert "incomplete**" in (tmp_path / "figures" / "figure1.md").read_text()


def test_a_right_panel_does_not_replace_the_left(
    write_all_resnets: Callable[..., None], places: list[str | Path]
) -> None:
    write_all_resnets()
    with pytest.raises(SystemExit, match=r"^error: no records .*deep_linear_mlp"):
        run_main("plot_figure1.py", *places)


def test_a_damaged_right_panel_is_an_error(
    write_all: Callable[..., None], write_resnet: Callable[..., Path], places: list[str | Path]
) -> None:
    write_all()
    (write_resnet("kfac") / "seed=3" / "curves.csv").write_text("")
    for script in ("plot_figure1.py", "plot_figure3.py"):
        with pytest.raises(SystemExit, match=r"^error: .*seed=3.* is damaged"):
            run_main(script, *places)


def test_plot_figure3(
    write_all_resnets: Callable[..., None], places: list[str | Path], tmp_path: Path
) -> None:
    write_all_resnets()
    run_main("plot_figure3.py", *places)
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"figure3.pdf", "figure3.png", "figure3.md"}


def test_no_records_fails_with_the_command(tmp_path: Path) -> None:
    # A SystemExit with a message prints it to stderr and exits with status 1.
    absent = tmp_path / "absent"
    roots = {
        "plot_figure1.py": ("--records", "--reference"),
        "plot_figure2.py": ("--records",),
        "plot_figure3.py": ("--records", "--reference"),
    }
    for script, options in roots.items():
        places = [part for option in options for part in (option, absent)]
        with pytest.raises(SystemExit, match=r"^error: no records .*python -m experiments\.train"):
            run_main(script, *places, "--output", tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_a_damaged_reference_is_an_error(write_record: Callable[..., Path], tmp_path: Path) -> None:
    write_record("kfac")
    (write_record("kfac", root="results") / "curves.csv").write_text("")
    places = ("--records", tmp_path / "runs", "--reference", tmp_path / "results")
    with pytest.raises(SystemExit, match="is damaged"):
        run_main("plot_figure1.py", *places, "--output", tmp_path / "figures")
