"""Sweeps: which configurations, where their records go with every launcher, what a failure leaves."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import select
from experiments.identity import run_path
from experiments.overrides import check_overrides
from experiments.schema import processes
from experiments.select import Grid, expand
from experiments.train import CONFIGS, build_training, train_in_sweep
from kfac2.figures.grid import Winner
from kfac2.figures.style import OPTIMIZERS
from kfac2.training.records import RunDirectory

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ["problem.depth=2", "problem.train_samples=64", "problem.test_samples=8", "training.epochs=1"]


@pytest.fixture
def hydra():
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        yield


@pytest.fixture(scope="module")
def paper_grid() -> Grid:
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return expand(["sweep=paper_grid"])


def test_the_paper_s_grid(paper_grid: Grid) -> None:
    counts = Counter(point.optimizer for point in paper_grid.points)
    assert counts == {"sgd": 6, "adam": 6, "kfac": 24, "two_level_kfac": 24}
    assert len({(point.optimizer, point.variant) for point in paper_grid.points}) == 60
    for name in OPTIMIZERS:
        own = [point.settings for point in paper_grid.points if point.optimizer == name]
        values = {key: {settings[key] for settings in own} for key in own[0]}
        expected = {"lr": {1e-2, 1e-3, 1e-4}, "momentum": {0.0, 0.9}}
        if "kfac" in name:
            expected |= {"damping": {1e-2, 1e-3}, "kl_clip": {1e-2, 1e-3}}
        assert values == expected
        assert "paper" in [point.variant for point in paper_grid.points if point.optimizer == name]
    assert all(point.seeds == [0, 1, 2, 3, 4] for point in paper_grid.points)


def test_adam_s_momentum_is_its_beta_1(paper_grid: Grid) -> None:
    betas = set()
    for config in paper_grid.configs:
        if config.optimizer.name == "adam":
            small = OmegaConf.merge(config, OmegaConf.from_dotlist(TINY))
            betas.add(build_training(small, [0]).optimizer.param_groups[0]["betas"])  # pyright: ignore
    assert betas == {(0.0, 0.999), (0.9, 0.999)}


@pytest.mark.usefixtures("hydra")
def test_plain_overrides_are_the_same_sweep(paper_grid: Grid) -> None:
    swept = ["optimizer.lr=0.01,0.001,1e-4", "optimizer.momentum=0.9,0", "optimizer.kl_clip=1e-2,1e-3"]
    plain = expand(["optimizer=kfac", *swept, "optimizer.damping=0.001,0.01"])
    variants = {point.variant for point in paper_grid.points if point.optimizer == "kfac"}
    assert {point.variant for point in plain.points} == variants
    assert len(plain.points) == 24
    narrower = expand(["sweep=paper_grid", "optimizer=adam,sgd", "optimizer.lr=1e-3"])
    assert [point.variant for point in narrower.points] == ["momentum=0.0", "paper"] * 2
    assert [point.optimizer for point in narrower.points] == ["adam"] * 2 + ["sgd"] * 2


def test_the_resnet_s_grid_lists_its_jobs_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    select.main(["sweep=paper_grid", "problem=resnet110_cifar10", f"runs={tmp_path}", "--list"])
    *paths, count = capsys.readouterr().out.splitlines()
    assert count == "60 configurations, 300 trainings, 0 of 300 records complete"
    assert len(set(paths)) == 60
    assert f"{tmp_path}/resnet110_cifar10/adam/momentum=0.0" in paths
    assert not list(tmp_path.iterdir())


def test_the_resnet_s_grid_as_a_job(tmp_path: Path) -> None:
    overrides = ("problem=resnet110_cifar10", "sweep=paper_grid", "optimizer=kfac")
    result = run("--cfg", "job", *overrides, runs=tmp_path)
    assert result.returncode == 0, result.stderr
    config = OmegaConf.create(result.stdout)
    assert (config.sweep.name, config.problem.name) == ("paper_grid", "resnet110_cifar10")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep=paper_grid"], "sweep=paper_grid needs -m"),
        (
            ["-m", "sweep=paper_grid", "optimizer=sgd,kfac"],
            "one optimizer at a time, or all with make sweep-mlp",
        ),
    ],
)
def test_a_sweep_that_would_be_another_one_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        check_overrides(arguments, CONFIGS)
    check_overrides(["-m", "sweep=paper_grid", "optimizer=kfac", "optimizer.damping=1"], CONFIGS)


def run(*overrides: str, runs: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.train", *overrides, f"runs={runs}", "tracking=none"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


SWEEP = ["sweep=paper_grid", "optimizer=sgd", "optimizer.lr=1e-2,1e-3,-1", "optimizer.momentum=0.9", *TINY]
SMALL = "depth=2,epochs=1,test_samples=8,train_samples=64"
VARIANTS = {f"depth=2,epochs=1,lr={lr},test_samples=8,train_samples=64" for lr in ("0.01", "-1.0")} | {SMALL}


def sweep_with_a_failure(launcher: str, runs: Path) -> dict[str, int]:
    """The names of the finished records, and when they were written."""
    result = run("-m", *SWEEP, f"hydra/launcher={launcher}", runs=runs)
    assert result.returncode == 1
    assert "Invalid learning rate: -1" in result.stderr
    home = runs / "deep_linear_mlp" / "sgd"
    assert {path.name for path in home.iterdir()} == VARIANTS
    records = {path.parent.name: path for path in home.glob("*/provenance.json")}
    assert len(records) == 2
    assert all(json.loads(path.read_text())["complete"] for path in records.values())
    return {name: path.stat().st_mtime_ns for name, path in records.items()}


def test_slurm_s_local_twin_leaves_the_same_records(tmp_path: Path) -> None:
    sweep_with_a_failure("submitit_local", tmp_path)
    assert list((tmp_path / "multirun" / ".submitit").glob("*/*_result.pkl"))


def test_processes_train_the_others_of_a_failure_and_then_only_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = sweep_with_a_failure("processes", tmp_path)
    select.main([*SWEEP, f"runs={tmp_path}", "--recipes", str(tmp_path / "recipe")])
    out = capsys.readouterr().out
    assert "failed: ValueError: Invalid learning rate: -1.0" in out
    assert "no recipes written" in out  # not the sweep as it stands
    assert not (tmp_path / "recipe").exists()
    table = pd.read_csv(tmp_path / "deep_linear_mlp" / "paper_grid.csv")
    assert sorted(table["status"].str[:8]) == ["complete", "complete", "failed: "]

    (tmp_path / "deep_linear_mlp" / "sgd" / SMALL / "provenance.json").unlink()
    now = sweep_with_a_failure("processes", tmp_path)
    assert now.pop(SMALL) != records.pop(SMALL)
    assert now == records


@pytest.mark.usefixtures("hydra")
def test_a_failure_is_forgotten_when_the_training_succeeds(tmp_path: Path) -> None:
    config = compose("train", overrides=[*TINY, f"runs={tmp_path}", "tracking=none", "seeds=[0]"])
    failure = run_path(config) / "failure.json"
    with pytest.raises(ValueError, match="momentum"):
        train_in_sweep(OmegaConf.merge(config, {"optimizer": {"momentum": -1.0}}))  # pyright: ignore
    (failed,) = tmp_path.rglob("failure.json")
    assert json.loads(failed.read_text())["error"].startswith("ValueError: ")
    failure.parent.mkdir()
    failed.rename(failure)
    train_in_sweep(config)
    assert not failure.exists()


@pytest.mark.usefixtures("hydra")
def test_a_record_that_another_process_writes_is_no_failure(tmp_path: Path) -> None:
    config = compose("train", overrides=[*TINY, f"runs={tmp_path}", "tracking=none", "seeds=[0]"])
    with (
        RunDirectory(run_path(config), {}).locked(),
        pytest.raises(RuntimeError, match="another process is writing"),
    ):
        train_in_sweep(config)
    assert {path.name for path in run_path(config).iterdir()} == {".lock"}


def test_processes_do_not_oversubscribe_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("joblib.cpu_count", lambda: 8)
    assert [processes("cpu", threads) for threads in (0, 1, 2, 3, 8, 16)] == [8, 8, 4, 2, 1, 1]
    assert processes("cuda:0", 1) == 1


def test_a_winner_s_recipe_is_its_configuration(paper_grid: Grid, tmp_path: Path) -> None:
    (point,) = (
        p for p in paper_grid.points if p.variant == "damping=0.001,lr=0.0001" and p.optimizer == "kfac"
    )
    winner = Winner(point.variant, point.settings | {"median": 0.1, "seeds": 5, "diverged": 0.0})
    config = paper_grid.configs[0]
    text = select.recipe(config, "kfac", winner, paper_grid.keys)
    assert text.startswith("# @package _global_\n")
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "own.yaml").write_text(text)
    overrides = ["optimizer=kfac", "recipe=own", f"hydra.searchpath=[file://{tmp_path}]"]
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        assert run_path(compose("train", overrides=overrides)).name == point.variant
