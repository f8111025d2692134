"""The command line: composition of the paper's settings, identity of a run, refusals."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig

from experiments.identity import identity, run_path
from experiments.overrides import check_overrides
from experiments.train import CONFIGS, build_training, check_machine
from kfac2 import KFAC, TwoLevelKFAC
from kfac2.optim.first_order import SGD, Adam

ROOT = Path(__file__).resolve().parent.parent.parent
CLASSES = {"sgd": SGD, "adam": Adam, "kfac": KFAC, "two_level_kfac": TwoLevelKFAC}
TINY = ["problem.depth=2", "problem.train_samples=64", "problem.test_samples=8"]


@pytest.fixture
def hydra():
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        yield


def config(*overrides: str) -> DictConfig:
    return compose("train", overrides=list(overrides))


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize("name", CLASSES)
def test_every_pair_composes_with_the_paper_s_values(name: str) -> None:
    settings = config(f"optimizer={name}")
    assert settings.optimizer.lr == 1e-3
    assert settings.optimizer.momentum == 0.9
    assert settings.optimizer.weight_decay == 1e-3
    assert (settings.training.epochs, settings.training.batch_size) == (100, 512)
    assert settings.seeds == [0, 1, 2, 3, 4]
    optimizer = build_training(config(f"optimizer={name}", *TINY)).optimizer
    assert type(optimizer) is CLASSES[name]
    if isinstance(optimizer, KFAC):
        group = optimizer.param_groups[0]
        assert (group["damping"], group["kl_clip"]) == (1e-2, 1e-3)
        assert (group["factor_interval"], group["inverse_interval"]) == (10, 100)
    if name == "adam":
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.usefixtures("hydra")
def test_identity_does_not_depend_on_how_it_was_written() -> None:
    plain = config("optimizer=kfac")
    spelled = config("optimizer=kfac", "optimizer.lr=0.001", "seeds=[0,1,2,3,4]", "tracking=none", "runs=x")
    assert identity(plain) == identity(spelled)
    assert run_path(plain) == Path("runs/deep_linear_mlp/kfac/paper")
    assert run_path(spelled) == Path("x/deep_linear_mlp/kfac/paper")


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize(
    ("overrides", "variant"),
    [
        (["seeds=[0,1,2]", "optimizer.lr=1e-2"], "lr=0.01,seeds=0-1-2"),
        (["training.epochs=20"], "epochs=20"),
        (["problem.depth=8", "problem.activation=relu"], "activation=relu,depth=8"),
    ],
)
def test_a_run_s_directory_says_what_differs_from_the_paper(overrides: list[str], variant: str) -> None:
    assert run_path(config("optimizer=sgd", *overrides)).name == variant


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["optimizer.dampening=1"],
            "unknown setting 'optimizer.dampening'.*optimizer.lr, optimizer.momentum",
        ),
        (["lr=1"], "Did you mean optimizer.lr?"),
        (["optimizer=sgd,kfac", "optimizer.damp=1"], "Did you mean optimizer.damping"),
        (["training.epoch=1"], "training.batch_size, training.epochs"),
    ],
)
def test_unknown_settings_are_refused_with_a_list(overrides: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        check_overrides(overrides, CONFIGS)


def test_settings_of_any_swept_optimizer_are_known() -> None:
    check_overrides(["-m", "optimizer=sgd,kfac", "optimizer.damping=1e-3", "+extra=1", "seeds=[0]"], CONFIGS)


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize(
    "override", ["training.epochs=many", "optimizer.lr=x", "seeds=3", "problem.depth=1.5"]
)
def test_wrong_types_are_refused(override: str) -> None:
    with pytest.raises(HydraException):
        config(override)


def run(*overrides: str, runs: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.train", *overrides, f"runs={runs}", "tracking=none"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_unknown_optimizer_lists_the_options(tmp_path: Path) -> None:
    result = run("optimizer=sdg", runs=tmp_path)
    assert result.returncode != 0
    for name in CLASSES:
        assert name in result.stderr
    assert not list(tmp_path.iterdir())


def test_multirun_over_optimizers_on_both_cores(tmp_path: Path) -> None:
    result = run(
        "-m",
        "optimizer=sgd,two_level_kfac",
        "hydra/launcher=joblib",
        "training.epochs=1",
        *TINY,
        runs=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    made = {path.parent.parent.name for path in tmp_path.glob("*/*/*/provenance.json")}
    assert made == {"sgd", "two_level_kfac"}


def test_schemas_are_no_choices(tmp_path: Path) -> None:
    options = run("optimizer=sdg", runs=tmp_path).stderr.partition("Available options")[2]
    assert "schema" not in options.partition("Config search path")[0]


def test_no_threads_are_refused() -> None:
    with pytest.raises(ValueError, match="threads must be positive"):
        check_machine("cpu", 0)


def test_an_absent_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="use device=cpu"):
        check_machine("cuda:0", 1)
