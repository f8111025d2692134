"""What is committed follows from the committed records; the notebooks are committed without outputs."""

import json
import re
import runpy
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from experiments import select
from experiments.identity import run_path
from experiments.paper import OPTIMIZERS
from experiments.train import CONFIGS

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "results" / "deep_linear_mlp"
STUDY = ROOT / "results" / "study"


def test_the_grid_s_summary_and_recipes_come_from_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    recipes = tmp_path / "recipe"
    select.main(["sweep=paper_grid", "runs=results", "--output", str(tmp_path), "--recipes", str(recipes)])
    for name in ("paper_grid.csv", "paper_grid.md"):
        assert (tmp_path / name).read_text() == (HOME / name).read_text()
    for name in OPTIMIZERS:
        path = Path("recipe") / "deep_linear_mlp" / f"{name}_best.yaml"
        assert (tmp_path / path).read_text() == (Path(CONFIGS) / path).read_text()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_winners_recipes_lead_to_their_records(name: str) -> None:
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose(
            "train", [f"optimizer={name}", f"recipe=deep_linear_mlp/{name}_best", "runs=results"]
        )
        assert (ROOT / run_path(config) / "provenance.json").exists()


def test_the_study_s_tables_come_from_the_records(tmp_path: Path) -> None:
    plot_study = runpy.run_path(str(ROOT / "scripts" / "plot_study.py"))["main"]
    plot_study(["--records", str(STUDY), "--output", str(tmp_path)])
    for name in ("tables.md", "decision.md"):
        assert (tmp_path / name).read_text() == (STUDY / name).read_text()
    for figure in tmp_path.glob("*.png"):
        assert (STUDY / figure.name).exists()


@pytest.mark.parametrize(
    ("page", "tables", "least"), [("README.md", "decision.md", 5), ("first_edition.md", "tables.md", 50)]
)
def test_the_study_s_pages_quote_their_tables(page: str, tables: str, least: int) -> None:
    text, numbers = ((STUDY / name).read_text() for name in (page, tables))
    intervals = set(re.findall(r"-?\d+\.\d+ \[-?\d+\.\d+, -?\d+\.\d+\]", text))
    assert len(intervals) > least
    assert [quoted for quoted in sorted(intervals) if quoted not in numbers] == []
    for name in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert (STUDY / name).exists(), name


@pytest.mark.parametrize("notebook", ["analysis.ipynb", "study.ipynb"])
def test_the_notebooks_have_no_outputs(notebook: str) -> None:
    for cell in json.loads((ROOT / "notebooks" / notebook).read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
