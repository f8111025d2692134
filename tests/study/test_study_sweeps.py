"""What the study trains: the sweeps' configurations, and that none of them touches the grid's recipes."""

import runpy
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from experiments import select
from experiments.select import Grid, expand
from experiments.study.variants import VARIANTS
from experiments.train import CONFIGS

ROOT = Path(__file__).parents[2]
STUDY = runpy.run_path(str(ROOT / "scripts" / "run_study.py"))
TRAININGS = [overrides for module, overrides in STUDY["STEPS"] if module == "experiments.train"]


@pytest.fixture(scope="module")
def grids() -> list[Grid]:
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return [expand(overrides) for overrides in TRAININGS]


def test_the_study_s_configurations(grids: list[Grid]) -> None:
    points = [(point.optimizer, point.variant) for grid in grids for point in grid.points]
    assert max(Counter(points).values()) == 2  # `full` at weight 1 answers two questions with one record
    assert len(grids) == 16
    swept = {point.settings.get("coarse") for grid in grids[1:3] for point in grid.points}
    assert swept == set(VARIANTS) - {"observed"}
    ten = [len(point.seeds) == 10 for grid in (*grids[:8], *grids[13:]) for point in grid.points]
    assert all(ten)
    depths = {point.settings["depth"] for grid in grids[8:10] for point in grid.points}
    assert depths == {8, 16, 32, 64, 128}
    assert {config.training.epochs for grid in grids[8:13] for config in grid.configs} == {40}


def test_the_finer_line_of_learning_rates_is_at_the_winners(grids: list[Grid]) -> None:
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        for grid, name in zip(grids[5:8], ("kfac", "two_level_kfac", "kfac"), strict=True):
            best = compose("train", [f"optimizer={name}", f"recipe=deep_linear_mlp/{name}_best"]).optimizer
            for config in grid.configs:
                for key in ("momentum", "damping", "kl_clip"):
                    assert config.optimizer[key] == best[key]
            assert min(c.optimizer.lr for c in grid.configs) == 1e-4
            assert max(c.optimizer.lr for c in grid.configs) == 1e-1


def test_selecting_from_a_study_s_sweep_writes_no_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    select.main(
        ["sweep=study_one_level", "optimizer=kfac", f"runs={tmp_path}", "--recipes", str(tmp_path / "r")]
    )
    assert "no recipes written" in capsys.readouterr().out
    assert not (tmp_path / "r").exists()


def test_the_study_goes_on_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=int("sweep=study_damping" in command))

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit, match=r"the other steps are done: experiments\.train sweep=study_damping"):
        STUDY["main"](["tracking=none"])
    assert len(commands) == len(STUDY["STEPS"])
    assert all(command[-2:] == ["hydra/launcher=processes", "tracking=none"] for command in commands)
