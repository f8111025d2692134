"""Sweeps: which configurations, where their records go with every launcher, what a failure leaves."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import select
from experiments.identity import run_path
from experiments.overrides import check_overrides
from experiments.paper import OPTIMIZERS
from experiments.schema import processes
from experiments.select import Grid, expand
from experiments.train import CONFIGS, build_training, run_directories, train
from experiments.training.records import RunDirectory

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
    assert config.optimizer.inverse == "tikhonov"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep=paper_grid"], "sweep=paper_grid needs -m"),
        (
            ["-m", "sweep=paper_grid", "optimizer=sgd,kfac"],
            "one optimizer at a time, or all with make sweep",
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


# What only the building of a problem finds out.
ACTIVATIONS = "problem.activation=identity,tanh,rleu"
SWEEP = [
    "sweep=paper_grid",
    "optimizer=sgd",
    "optimizer.lr=1e-2",
    "optimizer.momentum=0.9",
    ACTIVATIONS,
    *TINY,
]
SMALL = "depth=2,epochs=1,lr=0.01,test_samples=8,train_samples=64"
TIKHONOV = "inverse=tikhonov,kl_clip=None,lr=0.01,momentum=0.0"
VARIANTS = {f"activation={name},{SMALL}" for name in ("tanh", "rleu")} | {SMALL}


def sweep_with_a_failure(launcher: str, runs: Path) -> dict[str, int]:
    """The names of the finished records, and when they were written."""
    result = run("-m", *SWEEP, f"hydra/launcher={launcher}", runs=runs)
    assert result.returncode == 1
    assert "unknown activation 'rleu'" in result.stderr
    assert "Traceback" not in result.stderr
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
    assert "failed: ValueError: unknown activation 'rleu'" in out
    assert "no recipes written" in out  # not the sweep as it stands
    assert not (tmp_path / "recipe").exists()
    table = pd.read_csv(tmp_path / "deep_linear_mlp" / "paper_grid.csv")
    assert sorted(table["status"].str[:8]) == ["complete", "complete", "failed: "]

    (tmp_path / "deep_linear_mlp" / "sgd" / SMALL / "provenance.json").unlink()
    now = sweep_with_a_failure("processes", tmp_path)
    assert now.pop(SMALL) != records.pop(SMALL)
    assert now == records


def train_in_sweep(config: Any) -> None:
    train(config, attempt=RunDirectory.failure_recorded)


@pytest.mark.usefixtures("hydra")
def test_a_failure_is_forgotten_when_training_begins(tmp_path: Path) -> None:
    config = compose("train", overrides=[*TINY, f"runs={tmp_path}", "tracking=none", "seeds=[0]"])
    with pytest.raises(ValueError, match="activation"):
        train_in_sweep(OmegaConf.merge(config, {"problem": {"activation": "rleu"}}))
    (failed,) = tmp_path.rglob("failure.json")
    assert json.loads(failed.read_text())["error"].startswith("ValueError: ")
    (directory,) = run_directories(config)
    directory.path.mkdir()
    failed.rename(directory.failure)
    train(config)  # outside a sweep too
    assert not directory.failure.exists()


@pytest.mark.usefixtures("hydra")
def test_one_seed_s_failure_stays_beside_the_records_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(config: Any, directory: RunDirectory, *_: Any) -> None:
        if directory.config["seeds"] == [0]:
            raise OSError("no\nspace")
        with directory.locked():
            directory.finish("cpu")

    monkeypatch.setattr("experiments.train.train_record", failing)
    for seed in (0, 1):
        overrides = ["problem=resnet20_cifar10_preview", f"seeds=[{seed}]", f"runs={tmp_path}"]
        config = compose("train", overrides=overrides)
        if seed == 0:
            with pytest.raises(OSError, match="space"):
                train_in_sweep(config)
        else:
            train_in_sweep(config)
    (failure,) = tmp_path.rglob("failure.json")
    assert failure.parent.name == "seed=0"
    assert json.loads(failure.read_text())["error"] == "OSError: no space"
    assert (failure.parent.parent / "seed=1" / "provenance.json").exists()


@pytest.mark.usefixtures("hydra")
def test_another_configuration_s_record_is_no_failure(tmp_path: Path) -> None:
    overrides = [*TINY, f"runs={tmp_path}", "tracking=none", "seeds=[0]"]
    train(compose("train", overrides=overrides))
    with pytest.raises(ValueError, match="holds the record of another configuration"):
        train_in_sweep(compose("train", overrides=[*overrides, "threads=2"]))
    assert not list(tmp_path.rglob("failure.json"))


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


NUMBERS: dict[str, Any] = {"median": 0.1, "seeds": 5, "diverged": 0.0}


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize(
    ("sweep", "variant"),
    [
        (["sweep=paper_grid"], "damping=0.001,lr=0.0001"),
        (["sweep=paper_grid", "optimizer.inverse=eigen,tikhonov", "optimizer.kl_clip=null,1"], TIKHONOV),
    ],
)
def test_a_winner_s_recipe_is_its_configuration(sweep: list[str], variant: str, tmp_path: Path) -> None:
    grid = expand(["optimizer=kfac", *sweep])
    text = select.recipe(grid, "kfac", NUMBERS | {"variant": variant})
    assert text.startswith("# @package _global_\n")
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "own.yaml").write_text(text)
    overrides = ["optimizer=kfac", "recipe=own", f"hydra.searchpath=[file://{tmp_path}]"]
    assert run_path(compose("train", overrides=overrides)).name == variant


def test_an_unfinished_grid_gets_no_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], paper_grid: Grid
) -> None:
    points = [point for point in paper_grid.points if point.optimizer == "sgd"]
    rows = [p.settings | {"optimizer": "sgd", "variant": p.variant, "status": "complete"} for p in points]
    table = pd.DataFrame(rows).assign(**NUMBERS)
    table.loc[table.index[-1], ["median", "status"]] = [float("nan"), "missing"]
    grid = Grid(points, paper_grid.configs[: len(points)], paper_grid.keys)
    select.write_recipes(tmp_path, grid, table, ["sweep=paper_grid"])
    assert "not written, the grid of sgd is not finished" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    table.loc[table.index[-1], "status"] = "failed: ValueError"
    select.write_recipes(tmp_path, grid, table, ["sweep=paper_grid", "runs=elsewhere", "device=cpu"])
    assert (tmp_path / "deep_linear_mlp" / "sgd_best.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep=typo"], "Could not find 'sweep/typo'"),
        (["problem=deep_linear_mlp,resnet110_cifar10", "optimizer=sgd"], "one problem at a time"),
        (["optimizer=kfac", "optimizer.dumping=1,2"], "Did you mean optimizer.damping"),
        (["optimizer=sgd", "optimizer.damping=1"], "unknown setting"),
    ],
)
def test_bad_arguments_of_select_are_one_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        select.main([*arguments, f"runs={tmp_path}"])
    assert not list(tmp_path.iterdir())


def test_select_knows_the_settings_of_the_chosen_optimizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    select.main(["-m", "optimizer=kfac", "optimizer.damping=1e-2,1", f"runs={tmp_path}", "--list"])
    assert "kfac/damping=1.0\n2 configurations, 10 trainings" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        select.main(["--lsit"])
    assert "unknown option --lsit" in capsys.readouterr().err


def test_select_refuses_records_of_another_machine_s_identity(tmp_path: Path) -> None:
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        train(compose("train", overrides=[*TINY, f"runs={tmp_path}", "tracking=none"]))
    with pytest.raises(SystemExit, match=r"error: .* holds the record of another configuration"):
        select.main(["optimizer=sgd", *TINY, f"runs={tmp_path}", "threads=2", "--list"])


@pytest.mark.usefixtures("hydra")
def test_slurm_s_settings() -> None:
    overrides = ["hydra/launcher=slurm", "threads=4", "hydra.launcher.partition=gpu"]
    launcher = compose("train", overrides=overrides, return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.cpus_per_task, launcher.partition) == (4, "gpu")
    assert launcher.max_num_timeout > 0  # a job out of time goes on
