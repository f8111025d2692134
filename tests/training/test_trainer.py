"""The trainer's rows against a plain loop, its record, and what a diverged seed leaves."""

import json
import math
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.problems import Cifar10, CifarResNet, DeepLinearMLP
from experiments.records.files import write_atomically
from experiments.training.records import RunDirectory
from experiments.training.tracking import NoTracker, WandbTracker, summary
from experiments.training.trainer import Training, TrainingSettings
from kfac2 import LevenbergMarquardt, TwoLevelKFAC
from kfac2.optim.first_order import SGD, Adam
from tests.problems.cifar_files import write_parquet

SMALL: dict[str, Any] = {"depth": 3, "train_samples": 100, "test_samples": 30}
CONFIG = {"problem": {"name": "deep_linear_mlp"}, "optimizer": {"name": "sgd"}, "seeds": [0, 1]}
COLUMNS = [
    "seed",
    "epoch",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "learning_rate",
    "seconds",
]


def sgd(model: torch.nn.Module, **options: object) -> SGD:
    return SGD(model, 0.01, momentum=0.9, **options)


def training(epochs: int = 3, factory=sgd, **settings) -> Training:
    return Training(DeepLinearMLP([0, 1], **SMALL), factory, TrainingSettings(epochs, 32, **settings))


def adam(model: torch.nn.Module, **options: Any) -> Adam:
    return Adam(model, 0.01, weight_decay=1e-3, **options)


def two_levels(model: torch.nn.Module, **options: Any) -> TwoLevelKFAC:
    return TwoLevelKFAC(model, 0.01, factor_interval=1, inverse_interval=2, **options)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Cifar10:
    return Cifar10(str(write_parquet(tmp_path_factory.mktemp("cifar"), "JPEG")))


def resnet_training(
    images: Cifar10, factory=sgd, epochs: int = 1, label: str | None = None, **settings: Any
) -> Training:
    problem = CifarResNet([0], 8, train_samples=16, test_samples=10, label=label, data=images)
    return Training(problem, factory, TrainingSettings(epochs, 8, **settings))


def test_losses_are_means_over_the_epoch_s_samples() -> None:
    rows = training().train_epoch()
    problem = DeepLinearMLP([0, 1], **SMALL)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.01, momentum=0.9)
    total, right = torch.zeros(2), torch.zeros(2)
    for inputs, targets in problem.train_batches(32):
        optimizer.zero_grad()
        output = problem.model(inputs)
        problem.losses(output, targets).sum().backward()
        optimizer.step()
        total += problem.losses(output, targets).detach() * targets.shape[1]
        right += ((output > 0) == (targets > 0.5)).sum(1)
    for r, row in enumerate(rows):
        assert list(row) == COLUMNS
        assert row["train_loss"] == pytest.approx(total[r].item() / 100, rel=1e-5)
        assert row["train_accuracy"] == pytest.approx(right[r].item() / 100, rel=1e-6)


def test_the_full_batch_s_loss_is_the_net_s_in_training_mode_and_leaves_no_trace() -> None:
    """Every fifth epoch and the last; the twin makes one batch of all samples, of another copy of the net."""
    run, untouched = training(epochs=7, factory=two_levels), training(epochs=7, factory=two_levels)
    untouched.problem.full_batch = lambda: None
    for epoch in range(1, 8):
        rows, others = run.train_epoch(), untouched.train_epoch()
        assert all("full_batch_loss" not in row for row in others)
        for own, other in zip(run.problem.model.buffers(), untouched.problem.model.buffers(), strict=True):
            assert own.equal(other)
        assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in others]
        if epoch not in (5, 7):
            assert all("full_batch_loss" not in row for row in rows)
            continue
        found = [row["full_batch_loss"] for row in rows]
        problem, copy = run.problem, deepcopy(run.problem.model)
        assert isinstance(problem, DeepLinearMLP)
        copy.train()
        expected = problem.losses(copy(problem.train_inputs.mT), problem.train_targets)
        assert found == pytest.approx(expected.tolist(), rel=1e-5)
        assert found != pytest.approx([row["train_loss"] for row in rows], rel=1e-3)


def test_batches_are_weighted_by_the_size_that_the_problem_states() -> None:
    """Here targets are ``(B, 3)``, whose last axis says nothing of it."""

    class Vectors:
        seeds, label, likelihood = [0], None, "gaussian"

        def __init__(self) -> None:
            self.model = torch.nn.Linear(2, 3)
            self.label_generators = [torch.Generator()]
            self.x, self.y = torch.randn(5, 2), torch.randn(5, 3)

        def train_batches(self, batch_size: int) -> Any:
            yield from zip(self.x.split(batch_size), self.y.split(batch_size), strict=True)

        def test_batches(self) -> Any:
            return self.train_batches(3)

        def batch_size(self, targets: torch.Tensor) -> int:
            return len(targets)

        def losses(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return (output - targets).square().mean()[None]

        def accuracies(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return torch.zeros(1)

    problem = cast(Any, Vectors())
    run = Training(problem, sgd, TrainingSettings(1, 3))
    (loss,) = run.evaluate()["loss"]
    expected = problem.losses(problem.model(problem.x), problem.y)
    assert loss == pytest.approx(expected.item(), rel=1e-6)


def test_each_seed_s_adapted_damping_is_in_its_row(tmp_path: Path) -> None:
    """And a resumed training goes on with it."""
    rule = LevenbergMarquardt(interval=1)
    factory = partial(two_levels, damping=0.1, adaptive_damping=rule)
    whole = training(factory=factory)
    rows = [row for _ in range(3) for row in whole.train_epoch()]
    dampings = [row["damping"] for row in rows]
    assert dampings[-2] != dampings[-1]
    assert 0.1 not in dampings
    first, second = training(factory=factory), training(factory=factory)
    first.train_epoch()
    second.load_state_dict(deepcopy(first.state_dict()))
    resumed = [row for _ in range(2) for row in second.train_epoch()]
    assert [row | {"seconds": 0} for row in resumed] == [row | {"seconds": 0} for row in rows[2:]]


def test_learning_rate_follows_the_milestones() -> None:
    run = training(epochs=5, milestones=[0.4, 0.8])
    rates = [run.train_epoch()[0]["learning_rate"] for _ in range(5)]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4])


def test_a_milestone_is_never_before_the_first_epoch() -> None:
    assert training(epochs=1, milestones=[0.4]).train_epoch()[0]["learning_rate"] == 1e-2


def test_a_deadline_stops_before_an_epoch_that_would_not_end_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.time", lambda: now[0])

    def timed(epochs: int) -> Training:
        run = training(epochs)
        real = run.train_epoch

        def train_epoch() -> Any:
            now[0] += 10
            return real()

        monkeypatch.setattr("time.perf_counter", lambda: now[0])
        monkeypatch.setattr(run, "train_epoch", train_epoch)
        return run

    directory = RunDirectory(tmp_path / "limited", CONFIG)
    rows = timed(5).run(directory, NoTracker(), deadline=1025)
    assert [row["epoch"] for row in rows] == [1, 1, 2, 2]  # the third would end at 1030
    assert not directory.is_complete()
    now[0] = 2000.0
    assert len(timed(5).run(directory, NoTracker(), deadline=2009)) == 2 * 2  # it knows what an epoch takes
    rows = timed(5).run(directory, NoTracker(), deadline=2030)
    assert directory.is_complete()
    whole = training(5)
    for _ in range(5):
        whole.train_epoch()
    assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in whole.rows]


def test_record_is_complete_and_says_what_made_it(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run", CONFIG)
    training().run(directory, NoTracker())
    frame = pd.read_csv(directory.curves)
    assert list(frame.columns) == [*COLUMNS, "full_batch_loss"]
    assert len(frame) == 2 * 3
    provenance = json.loads(directory.provenance.read_text())
    assert provenance["complete"] is True
    assert provenance["config"] == CONFIG
    assert provenance["torch_version"] == torch.__version__
    assert set(provenance) >= {"code_version", "device", "threads", "date", "replicas", "label"}
    assert {path.name for path in directory.path.iterdir()} == {"curves.csv", "provenance.json", ".lock"}


def test_a_record_of_another_configuration_is_refused(tmp_path: Path) -> None:
    training(1).run(RunDirectory(tmp_path, CONFIG), NoTracker())
    with pytest.raises(ValueError, match=r"another configuration \(seeds=\[0, 1\] there, \[0, 2\] here\)"):
        RunDirectory(tmp_path, CONFIG | {"seeds": [0, 2]})
    other = {"problem": {"name": "x", "depth": 3}}
    expected = r"\(problem.depth=None there, 3 here, problem.name=deep_linear_mlp there, x here\)"
    with pytest.raises(ValueError, match=expected):
        RunDirectory(tmp_path, CONFIG | other)


def test_two_writers_of_one_record_are_refused(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path, CONFIG)
    with directory.locked(), pytest.raises(RuntimeError, match="another process is writing"):
        training(1).run(directory, NoTracker())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def disk_full(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, disk_full)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_kfac_logs_its_diagnostics() -> None:
    (row, _) = training(factory=two_levels).train_epoch()
    assert 0 < row["nu"] <= 1
    assert row["coarse_ratio"] > 0
    assert row["coarse_indefinite"] == 0


def test_a_diverged_seed_is_recorded_and_the_other_goes_on() -> None:
    healthy, broken = training(factory=two_levels), training(factory=two_levels)
    with torch.no_grad():
        broken.problem.model.get_parameter("layers.0.weight")[1] = torch.nan
    with pytest.warns(RuntimeWarning, match="not finite"):
        rows = broken.train_epoch()
    expected = healthy.train_epoch()
    assert rows[0] | {"seconds": 0} == expected[0] | {"seconds": 0}
    assert rows[1]["train_loss"] != rows[1]["train_loss"]
    assert broken.optimizer.diverged.tolist() == [False, True]
    assert rows[0]["rejected_samples"] == 0
    assert rows[1]["rejected_samples"] > 0
    assert rows[0]["failed_inverses"] == rows[1]["failed_inverses"] == 0


@pytest.mark.parametrize("factory", [sgd, two_levels])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_run_without_a_living_seed_is_recorded_without_training_it(
    factory: Any, tmp_path: Path, images: Cifar10, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = resnet_training(images, factory, epochs=3)
    with torch.no_grad():
        run.problem.model.get_parameter("conv.weight")[0] = torch.nan
    passes = []
    real = run.evaluate
    monkeypatch.setattr(run, "evaluate", lambda: passes.append(1) or real())
    directory = RunDirectory(tmp_path, CONFIG | {"seeds": [0]})
    run.run(directory, NoTracker())
    assert len(passes) == 1
    assert directory.is_complete()
    frame = pd.read_csv(directory.curves)
    assert frame["epoch"].tolist() == [1, 2, 3]
    assert frame["seed"].tolist() == [0, 0, 0]
    for column in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        assert np.isnan(frame[column].to_numpy()).all()
    assert np.isfinite(frame[["seconds", "learning_rate"]].to_numpy()).all()


@pytest.mark.parametrize("factory", [sgd, adam])
def test_a_resnet_goes_on_from_its_checkpoint(factory: Any, tmp_path: Path, images: Cifar10) -> None:
    whole, begun, resumed = (resnet_training(images, factory, channels_last=True) for _ in range(3))
    directory = RunDirectory(tmp_path, CONFIG)
    begun.train_epoch()
    directory.save_checkpoint(begun.state_dict())
    torch.rand(3)
    resumed.load_state_dict(directory.load_checkpoint(torch.device("cpu")) or {})
    resumed.train_epoch()
    expected = [row for _ in range(2) for row in whole.train_epoch()]
    assert [row | {"seconds": 0} for row in resumed.rows] == [row | {"seconds": 0} for row in expected]
    for ours, theirs in zip(
        resumed.problem.model.parameters(), whole.problem.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()


def test_an_error_of_a_healthy_run_is_not_taken_for_divergence(images: Cifar10) -> None:
    run = resnet_training(images)

    def broken() -> None:
        raise RuntimeError("out of memory")

    run.optimizer.step = broken
    with pytest.raises(RuntimeError, match="out of memory"):
        run.train_epoch()


def test_the_record_says_the_problem_s_label(tmp_path: Path, images: Cifar10) -> None:
    directory = RunDirectory(tmp_path, CONFIG | {"seeds": [0]})
    run = resnet_training(images, label="preview")
    run.run(directory, NoTracker())
    label = "preview; CIFAR-10 (JPEG copy)"
    assert json.loads(directory.provenance.read_text())["label"] == label

    directory.write_provenance(False, "cpu", label)
    directory.save_checkpoint(run.state_dict())
    with pytest.raises(ValueError, match=r"begun as 'preview; .*' and cannot go on as 'CIFAR-10 \(JPEG"):
        resnet_training(images).run(directory, NoTracker())
    resnet_training(images, label="preview").run(directory, NoTracker())
    assert directory.is_complete()


@pytest.mark.parametrize("factory", [sgd, two_levels])
def test_channels_last_changes_the_layout_and_not_the_numbers(factory: Any, images: Cifar10) -> None:
    plain = resnet_training(images, factory)
    fast = resnet_training(images, factory, channels_last=True)
    seen = []

    def note(module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        tensors = (args[0], module.get_parameter("weight"), output)
        seen.append([t.is_contiguous(memory_format=torch.channels_last) for t in tensors])

    for name in ("conv", "stages.1.0.conv1"):
        fast.problem.model.get_submodule(name).register_forward_hook(note)
    (row,), (expected,) = fast.train_epoch(), plain.train_epoch()
    assert len(seen) == 2 * (2 + 1)
    assert all(map(all, seen))
    assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)
    assert row["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-2)


def test_a_compiled_model_trains_alike(images: Cifar10, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        return lambda *inputs: calls.append("") or graph.forward(*inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    factory = partial(TwoLevelKFAC, lr=0.01, factor_interval=2, inverse_interval=2)
    plain, compiled = (resnet_training(images, factory, 2, compile=on) for on in (False, True))
    for _ in range(2):
        (one,), (other,) = plain.train_epoch(), compiled.train_epoch()
        for name in ("train_loss", "test_loss", "nu"):
            assert other[name] == pytest.approx(one[name], rel=1e-4)
    steps, evaluations = 2, 2
    assert len(calls) == steps + evaluations  # the other two steps are refreshes
    assert plain.state_dict()["model"].keys() == compiled.state_dict()["model"].keys()
    torch._dynamo.reset()


def test_autocast_is_for_the_forward_pass_alone(images: Cifar10) -> None:
    plain, fast = resnet_training(images), resnet_training(images, autocast=True)
    outputs: list[torch.dtype] = []
    losses: list[torch.dtype] = []
    fast.problem.model.register_forward_hook(lambda _, __, output: outputs.append(output.dtype))
    real = fast.problem.losses

    def noting(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert not torch.is_autocast_enabled("cpu")
        losses.append(real(output, targets).dtype)
        return real(output, targets)

    fast.problem.losses = noting
    (row,), (expected,) = fast.train_epoch(), plain.train_epoch()
    assert outputs == [torch.bfloat16] * 3
    assert losses == [torch.float32] * 3
    assert all(p.dtype == torch.float32 for p in fast.problem.model.parameters())
    assert row["train_loss"] != expected["train_loss"]
    assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=0.05)


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 0},
        {"epochs": 1, "batch_size": 0},
        {"epochs": 1, "milestones": [40]},
        {"epochs": 1, "milestones": [0.4, 0.4]},
        {"epochs": 1, "milestones": [0.8, 0.4]},
        {"epochs": 1, "lr_decay": -0.1},
        {"epochs": 1, "lr_decay": math.nan},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"training\."):
        TrainingSettings(**cast("dict[str, Any]", {"batch_size": 32} | settings))


def test_wandb_receives_one_offline_run_per_seed(tmp_path: Path) -> None:
    tracker = WandbTracker(directory=str(tmp_path / "tracked"))
    training(1).run(RunDirectory(tmp_path / "run", CONFIG), tracker)
    runs = list((tmp_path / "tracked" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 2
    assert len({run.parent.name.rpartition("-")[2] for run in runs}) == 2


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What W&B's runs are started with; ``options["run"]`` is the run."""
    import wandb

    calls: list[dict[str, Any]] = []

    def init(**options: Any) -> Any:
        run = SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None, summary={})
        calls.append(options | {"run": run})
        return run

    monkeypatch.setattr(wandb, "init", init)
    return calls


def test_seeds_trained_one_by_one_share_a_wandb_group(tmp_path: Path, started: list[dict[str, Any]]) -> None:
    for seed in (0, 1):
        WandbTracker(directory=str(tmp_path)).start(CONFIG | {"seeds": [seed]}, first_epoch=1, identifier="a")
    assert started[0]["group"] == started[1]["group"]
    assert started[0]["id"] != started[1]["id"]


def test_a_sweep_is_a_wandb_group_with_tags_and_summaries(
    tmp_path: Path, started: list[dict[str, Any]]
) -> None:
    for rate in (0.1, 0.2):
        config = CONFIG | {"optimizer": {"name": "sgd", "lr": rate}}
        tracker = WandbTracker(directory=str(tmp_path), recipe="deep_linear_mlp/sgd", sweep="paper_grid")
        training(7).run(RunDirectory(tmp_path / str(rate), config), tracker)
    assert {each["group"] for each in started} == {"deep_linear_mlp-paper_grid"}
    assert started[1]["tags"] == ["deep_linear_mlp", "sgd", "deep_linear_mlp/sgd", "paper_grid", "seed1"]
    assert len({each["config"]["configuration"] for each in started}) == 2
    assert started[0]["config"]["recipe"] == "deep_linear_mlp/sgd"
    rows = pd.read_csv(tmp_path / "0.1" / "curves.csv").query("seed == 1")
    summary = started[1]["run"].summary
    assert summary["final_train_loss"] == pytest.approx(rows["train_loss"].tail(5).mean())
    assert summary["best_test_accuracy"] == pytest.approx(rows["test_accuracy"].max())
    assert (summary["epochs"], summary["diverged"]) == (7, False)


def test_a_training_from_the_start_is_a_new_wandb_run_and_a_resumed_one_the_same(
    tmp_path: Path, started: list[dict[str, Any]]
) -> None:
    directory = RunDirectory(tmp_path / "run", CONFIG)
    tracker = WandbTracker(directory=str(tmp_path))
    begun = training(2)
    begun.train_epoch()
    with directory.locked():
        directory.save_checkpoint(begun.state_dict())
    training(2).run(directory, tracker)
    training(2).run(directory, tracker, rerun=True)
    resumed, rerun = [[run["id"] for run in started[start : start + 2]] for start in (0, 2)]
    assert all(begun.identifier in name for name in resumed)
    assert not set(resumed) & set(rerun)


@pytest.mark.parametrize(
    ("given", "environment", "mode"),
    [
        (None, {}, "offline"),
        (None, {"WANDB_MODE": "online"}, "online"),
        (None, {"WANDB_MODE": "dryrun"}, "offline"),
        (None, {"WANDB_MODE": "disabled"}, "disabled"),
        (None, {"WANDB_MODE": "online", "WANDB_DISABLED": "true"}, "disabled"),
        (None, {"WANDB_MODE": "online", "WANDB_DISABLED": "false"}, "online"),
        ("offline", {"WANDB_MODE": "online", "WANDB_DISABLED": "true"}, "offline"),
    ],
)
def test_wandb_s_environment_decides_where_no_setting_does(
    given: str | None, environment: dict[str, str], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert WandbTracker(given).mode == mode
    monkeypatch.setenv("WANDB_DISABLED", "")
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(ValueError, match="unknown WANDB_MODE 'onlin'"):
        WandbTracker()


def test_disabled_tracking_leaves_nothing(tmp_path: Path, started: list[dict[str, Any]]) -> None:
    training(1).run(
        RunDirectory(tmp_path / "run", CONFIG), WandbTracker("disabled", directory=str(tmp_path / "w"))
    )
    assert not started
    assert not (tmp_path / "w").exists()


def test_a_diverged_seed_s_summary() -> None:
    finite, nan = {"train_loss": 1.0, "test_loss": 1.0, "test_accuracy": 0.5, "seconds": 1.0}, math.nan
    diverged = summary([finite, finite | {"train_loss": nan, "test_accuracy": nan}])
    assert diverged["diverged"]
    assert diverged["best_test_accuracy"] == 0.5
    assert math.isnan(diverged["final_train_loss"])


def test_a_wandb_failure_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def broken(**_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(wandb, "init", broken)
    directory = RunDirectory(tmp_path / "run", CONFIG)
    with pytest.warns(UserWarning, match="W&B tracking stopped, the training goes on: no space"):
        training(2).run(directory, WandbTracker(directory=str(tmp_path)))
    assert directory.is_complete()


def test_a_rerun_that_cannot_start_keeps_the_record(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path, CONFIG)
    training(1).run(directory, NoTracker())
    with directory.locked(), pytest.raises(RuntimeError, match="another process is writing"):
        training(1).run(directory, NoTracker(), rerun=True)
    assert directory.is_complete()
    training(1).run(directory, NoTracker(), rerun=True)
    assert directory.is_complete()
