"""Every question is answered from what the study trains and measures, and from nothing else."""

import json
import runpy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from experiments.figures import save_figure
from experiments.figures.study.microscope import DIRECTIONS, MATRICES
from experiments.figures.study.questions import QUESTIONS
from experiments.figures.study.records import Study
from experiments.study.arms import CONVOLUTIONS, MICROSCOPE, TRAININGS
from tests.figures.conftest import write_files

ROOT = Path(__file__).parents[2]
plot = runpy.run_path(str(ROOT / "scripts" / "plot_study.py"))["main"]
TABLES = ("directions", "coarse", "spectrum")


def provenance(config: dict[str, Any], label: str | None = None) -> dict[str, Any]:
    return {"config": config, "complete": True, "label": label, "device": "cpu", "threads": 1}


def curves(seeds: list[int], epochs: int, level: float, two_levels: bool) -> pd.DataFrame:
    epoch = np.tile(np.arange(1, epochs + 1), len(seeds))
    seed = np.repeat(seeds, epochs)
    loss = level * (1 + 0.01 * seed) * (1 + 5 / epoch)
    loss[seed == 1] = np.nan if level > 0.09 else 0.05  # one seed of some trainings diverges
    frame = pd.DataFrame({"seed": seed, "epoch": epoch, "train_loss": loss, "test_loss": loss, "nu": 0.9})
    frame = frame.assign(train_accuracy=0.9, test_accuracy=0.9, learning_rate=1e-3, seconds=1.0 * epoch)
    return frame.assign(coarse_ratio=0.5) if two_levels else frame


def write_trainings(root: Path) -> None:
    for number, arm in enumerate(TRAININGS):
        level, seeds = 0.03 + 0.01 * (number % 8), list(range(arm.seeds))
        own = curves(seeds, arm.settings.get("training.epochs", 100), level, arm.optimizer != "kfac")
        names = {"problem": {"name": arm.problem}, "optimizer": {"name": arm.optimizer}}
        epochs = {"training": {"epochs": max(own["epoch"])}, "seeds": seeds}
        write_files(root / arm.problem / arm.optimizer / arm.variant, own, provenance(names | epochs))


def measured(seed: int, epoch: int) -> dict[str, pd.DataFrame]:
    number = {"error": 1.0, "scaled_error": 0.5, "cosine": 0.3, "pcg_iterations": 5000 if seed else 10}
    coarse = {"distance": 0.5, "off_diagonal": 0.2, "normalised_off_diagonal": 0.4, "negative_eigenvalues": 1}
    coarse |= {"size": 0.1, "cosine": 0.6}
    where = [{"seed": seed, "epoch": epoch, "statistics": s} for s in ("batch", "frozen")]
    return {
        "directions": pd.DataFrame([w | {"direction": d} | number for w in where for d in DIRECTIONS]),
        "coarse": pd.DataFrame([w | {"matrix": m} | coarse for w in where for m in MATRICES]),
        "spectrum": pd.DataFrame(
            [
                w | {"matrix": m, "place": p, "eigenvalue": 10.0**-p}
                for w in where
                for m in MATRICES
                for p in (0, 4)
            ]
        ),
    }


def write_measurement(path: Path, tables: dict[str, pd.DataFrame], label: str | None) -> None:
    path.mkdir(parents=True)
    for name, table in tables.items():
        table.to_csv(path / f"{name}.csv", index=False)
    (path / "provenance.json").write_text(json.dumps(provenance({}, label)))


def write_measurements(root: Path) -> None:
    for seed in (0, 1):
        tables = [measured(seed, epoch) for epoch in (0, 5)]
        joined = {name: pd.concat([each[name] for each in tables]) for name in TABLES}
        for arm in MICROSCOPE.values():
            write_measurement(root / "microscope" / arm.group / f"seed={seed}", joined, None)
        coarse = (
            joined["coarse"].query("statistics == 'batch' and matrix != 'true'").drop(columns="statistics")
        )
        path = root / "coarse_matrix" / CONVOLUTIONS.group / f"seed={seed}"
        write_measurement(path, {"coarse": coarse}, "preview: few images")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    write_trainings(root)
    write_measurements(root)
    return root


def test_all_questions_are_answered(records: Path, tmp_path: Path) -> None:
    plot(["--records", str(records), "--output", str(tmp_path)])
    text = (tmp_path / "tables.md").read_text()
    assert "Not answered" not in text
    assert "nan" not in text
    assert "**preview: few images**" in text
    assert "Not compared" not in text
    assert text.startswith("# The study's tables\n\n## Under both losses\n")
    assert [f"## {number}. {q.title}" in text for number, q in enumerate(QUESTIONS, start=1)] == [True] * 8
    assert text.count("\n## ") == 1 + len(QUESTIONS)
    names = {path.name for path in tmp_path.iterdir()}
    assert {f"{q.name}.{kind}" for q in QUESTIONS for kind in ("png", "pdf")} | {
        "tables.md",
        "decision.md",
    } == names


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.name)
def test_the_panels_have_room(records: Path, question: Any, tmp_path: Path) -> None:
    figure = question.answer(Study(records)).figure
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of axes that collapse
        save_figure(figure, tmp_path, "figure")
    inches = figure.dpi_scale_trans.inverted()
    for axes in figure.axes:
        box = axes.get_window_extent().transformed(inches)
        assert min(box.width, box.height) > 1.2, axes.get_ylabel()
    plt.close("all")


def test_the_rest_is_answered_where_records_are_missing(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "coarse_matrix").symlink_to(records / "coarse_matrix")
    output = tmp_path / "study"
    with pytest.raises(SystemExit, match=r"not answered: question 1, 2, 3, 4, 5, 6, 7$"):
        plot(["--records", str(tmp_path), "--output", str(output)])
    assert "no finished training of the study" in capsys.readouterr().out
    assert "Not answered: no finished measurements" in (output / "tables.md").read_text()
    assert (output / "q8_convolutions.png").exists()
