"""The command line: composition of the paper's settings, identity of a run, refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig

from experiments.identity import identity, run_path
from experiments.overrides import check_overrides
from experiments.problems import Cifar10, CifarResNet
from experiments.problems.cifar10 import Split
from experiments.schema import check_settings, fast_bfloat16
from experiments.train import CONFIGS, build_training, check_machine, run_directories, train
from kfac2 import KFAC, TwoLevelKFAC
from kfac2.optim.first_order import SGD, Adam
from tests.problems.cifar_files import write_parquet

ROOT = Path(__file__).resolve().parent.parent.parent
CLASSES = {"sgd": SGD, "adam": Adam, "kfac": KFAC, "two_level_kfac": TwoLevelKFAC}
SCALES = [
    "resnet110_cifar10",
    "resnet110_cifar10_reduced",
    "resnet20_cifar10_preview",
    "resnet110_cifar10_short",
]
PREVIEW, SHORT = SCALES[2:]
TINY = ["problem.depth=2", "problem.train_samples=64", "problem.test_samples=8"]


@pytest.fixture
def hydra():
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        yield


def config(*overrides: str) -> DictConfig:
    return compose("train", overrides=list(overrides))


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize("name", ["kfac", "two_level_kfac"])
def test_damping_adapts_where_it_is_asked_for_and_the_record_s_name_says_so(name: str) -> None:
    fixed, adaptive = (
        config(f"optimizer={name}"),
        config(f"optimizer={name}", "optimizer.adaptive_damping=true"),
    )
    assert run_path(fixed).name == "paper"
    assert run_path(adaptive).name == "adaptive_damping=True"
    assert "adaptive_damping" not in identity(fixed)["optimizer"]
    optimizer = build_training(
        config(f"optimizer={name}", "optimizer.adaptive_damping=true", *TINY), [0, 1]
    ).optimizer
    assert optimizer.diagnostics["damping"].tolist() == [1e-2, 1e-2]


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize("name", CLASSES)
def test_every_pair_composes_with_the_paper_s_values(name: str) -> None:
    settings = config(f"optimizer={name}")
    assert settings.optimizer.lr == 1e-3
    assert settings.optimizer.momentum == 0.9
    assert settings.optimizer.weight_decay == 1e-3
    assert (settings.training.epochs, settings.training.batch_size) == (100, 512)
    assert settings.seeds == [0, 1, 2, 3, 4]
    optimizer = build_training(config(f"optimizer={name}", *TINY), [0, 1]).optimizer
    assert type(optimizer) is CLASSES[name]
    if isinstance(optimizer, KFAC):
        group = optimizer.param_groups[0]
        assert (group["damping"], group["kl_clip"]) == (1e-2, 1e-3)
        assert (group["factor_interval"], group["inverse_interval"]) == (10, 100)
    if name == "adam":
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize(
    ("problem", "epochs", "intervals"),
    [(SCALES[0], 100, (200, 2000)), (SCALES[1], 15, (10, 30)), (PREVIEW, 6, (4, 12)), (SHORT, 10, (20, 200))],
)
@pytest.mark.parametrize("name", CLASSES)
def test_resnets_compose_with_the_paper_s_values(
    problem: str, epochs: int, intervals: tuple[int, int], name: str
) -> None:
    settings = config(f"problem={problem}", f"optimizer={name}")
    optimizer, training = settings.optimizer, settings.training
    assert optimizer.lr == (1e-3 if name == "adam" else 1e-2)
    assert (optimizer.momentum, optimizer.weight_decay) == (0.9, 1e-3)
    assert (training.epochs, training.milestones, training.lr_decay) == (epochs, [0.4, 0.8], 0.1)
    assert training.batch_size == (128 if "kfac" in name else 64)
    assert training.channels_last == (problem != SCALES[0])
    assert training.autocast == (problem != SCALES[0] and fast_bfloat16("cpu"))
    assert settings.seeds == list(range(3 if problem in (SCALES[1], SHORT) else 5))
    if "kfac" in name:
        assert (optimizer.damping, optimizer.kl_clip, optimizer.inverse) == (1e-3, 1e-2, "tikhonov")
        assert (optimizer.factor_interval, optimizer.inverse_interval) == intervals


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize(
    ("problem", "depth", "train_samples", "test_samples", "label"),
    [
        (SCALES[0], 110, None, None, None),
        (SCALES[1], 110, 5000, 2000, "reduced: ResNet110, 5,000 images, 15 epochs"),
        (PREVIEW, 20, 5000, 2000, "preview: ResNet20, 5,000 images, 6 epochs"),
        (SHORT, 110, None, None, "short: ResNet110, all images, 10 epochs"),
        ("resnet20_cifar10_short", 20, None, None, "short: ResNet20, all images, 8 epochs"),
    ],
)
def test_scales(
    problem: str, depth: int, train_samples: int | None, test_samples: int | None, label: str | None
) -> None:
    settings = config(f"problem={problem}").problem
    assert settings.depth == depth
    assert (settings.train_samples, settings.test_samples) == (train_samples, test_samples)
    assert settings.label == label


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize(
    ("problem", "iterations", "factors", "inverses"),
    [
        (SCALES[0], 39_100, 196, 20),
        (SCALES[1], 600, 60, 20),
        (PREVIEW, 240, 60, 20),
        (SHORT, 3_910, 196, 20),
        ("resnet20_cifar10_short", 3_128, 157, 16),
    ],
)
def test_number_of_refreshes(
    problem: str, iterations: int, factors: int, inverses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blank(self: Cifar10, train_samples: int | None, test_samples: int | None) -> tuple[Split, Split]:
        images = [torch.empty(n, 0) for n in (train_samples or 50_000, test_samples or 10_000)]
        train, test = (Split(i, torch.zeros(len(i), dtype=torch.int64), False) for i in images)
        return train, test

    monkeypatch.setattr(Cifar10, "load", blank)
    settings = config(f"problem={problem}", "optimizer=kfac")
    run = build_training(settings, [0])
    assert isinstance(run.problem, CifarResNet)
    total = -(-len(run.problem.train_targets) // settings.training.batch_size) * settings.training.epochs
    assert total == iterations
    assert -(-total // settings.optimizer.factor_interval) == factors
    assert -(-total // settings.optimizer.inverse_interval) == inverses


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize("name", CLASSES)
def test_resnets_are_built_from_their_configuration(name: str, preview: list[str]) -> None:
    run = build_training(config(f"optimizer={name}", *preview, "training.autocast=true"), [3])
    assert type(run.optimizer) is CLASSES[name]
    assert isinstance(run.problem, CifarResNet)
    assert run.problem.seeds == [3]
    assert run.problem.label == "preview: ResNet8, 24 images, 1 epochs; CIFAR-10 (JPEG copy)"
    assert run.settings.channels_last
    assert run.settings.autocast
    assert run.problem.model.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_fast_bfloat16_is_the_hardware_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert not fast_bfloat16("cuda")
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    for has_it in (False, True):
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda value=has_it: value)
        assert fast_bfloat16("cpu") is has_it


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


@pytest.mark.usefixtures("hydra")
def test_settings_that_came_later_leave_the_committed_records_their_identity() -> None:
    plain = config("optimizer=two_level_kfac", "runs=results")
    committed = json.loads((ROOT / run_path(plain) / "provenance.json").read_text())["config"]
    assert identity(plain)["optimizer"] == committed["optimizer"]
    changed = config(
        "optimizer=two_level_kfac", "optimizer.coarse_damping=consistent", "optimizer.coarse_max_ratio=2"
    )
    assert run_path(changed).name == "coarse_damping=consistent,coarse_max_ratio=2.0"
    assert "compile" not in identity(config())["training"]
    with pytest.raises(ValueError, match=r"training\.compile=true is not for seeds that train side by side"):
        train(config("training.compile=true"))
    compiled = config("training.compile=true")
    assert identity(compiled)["training"]["compile"]
    assert run_path(compiled).name == "compile=True"
    coarse = build_training(changed, [0]).optimizer.coarse
    assert (coarse.damping, coarse.max_ratio) == ("consistent", 2.0)


@pytest.mark.usefixtures("hydra")
def test_each_seed_of_a_resnet_has_its_record() -> None:
    settings = config(f"problem={PREVIEW}", "optimizer=sgd", "seeds=[4,1]", "training.batch_size=128")
    first, second = run_directories(settings)
    base = Path("runs") / PREVIEW / "sgd" / "batch_size=128"
    assert (first.path, second.path) == (base / "seed=4", base / "seed=1")
    assert (first.config["seeds"], second.config["seeds"]) == ([4], [1])
    (together,) = run_directories(config("optimizer=sgd", "seeds=[4,1]"))
    assert together.path == Path("runs/deep_linear_mlp/sgd/seeds=4-1")
    assert together.config["seeds"] == [4, 1]
    with pytest.raises(ValueError, match=r"distinct and not empty, got \[1, 1\]"):
        check_settings(config(f"problem={PREVIEW}", "seeds=[1,1]"))


@pytest.mark.usefixtures("hydra")
def test_a_record_says_the_machine_but_its_directory_and_data_s_place_do_not_matter() -> None:
    plain = config(f"problem={PREVIEW}")
    machine = config(f"problem={PREVIEW}", "device=cuda:0", "threads=2")
    assert run_path(machine) == run_path(plain)
    assert identity(machine)["device"] == "cuda:0"
    assert identity(machine)["threads"] == 2
    assert (
        run_path(config(f"problem={PREVIEW}", "training.channels_last=false")).name == "channels_last=False"
    )
    moved = config(f"problem={PREVIEW}", "problem.data.path=/elsewhere", "problem.label=other")
    assert identity(moved) == identity(plain)
    assert set(identity(plain)["problem"]) == {"name", "depth", "train_samples", "test_samples"}
    assert isinstance(identity(plain)["training"]["autocast"], bool)


@pytest.fixture
def preview(tmp_path: Path) -> list[str]:
    """A ResNet of two steps on a JPEG copy."""
    return [
        f"problem={PREVIEW}",
        f"problem.data.path={write_parquet(tmp_path / 'images', 'JPEG')}",
        "problem.depth=8",
        "problem.train_samples=24",
        "problem.test_samples=10",
        "training.epochs=1",
        "tracking=none",
        f"runs={tmp_path / 'runs'}",
    ]


@pytest.mark.usefixtures("hydra")
def test_complete_records_are_not_trained_again_unless_asked(
    preview: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def curves() -> dict[str, int]:
        return {str(path.parent.name): path.stat().st_mtime_ns for path in tmp_path.rglob("curves.csv")}

    train(config(*preview, "seeds=[0]"))
    before = curves()
    capsys.readouterr()
    train(config(*preview, "seeds=[0,1]"))
    assert capsys.readouterr().out.count("complete, not trained again") == 1
    assert curves() == before | {"seed=1": curves()["seed=1"]}
    train(config(*preview, "seeds=[0]", "rerun=true"))
    assert curves()["seed=0"] != before["seed=0"]


@pytest.mark.usefixtures("hydra")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("problem.depth=9", r"depth is 6n \+ 2"),
        ("training.milestones=[40,80]", "training.milestones are fractions"),
        ("threads=0", "threads must be positive"),
        ("seeds=[0,0]", "seeds must be distinct"),
    ],
)
def test_bad_settings_are_refused_before_any_training(
    override: str, message: str, preview: list[str], tmp_path: Path
) -> None:
    with pytest.raises((ValueError, HydraException), match=message):
        train(config("seeds=[0,1]", *preview, override))
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("hydra")
def test_another_seed_s_foreign_record_is_refused_before_any_training(
    preview: list[str], tmp_path: Path
) -> None:
    train(config(*preview, "seeds=[1]"))
    with pytest.raises(ValueError, match=r"seed=1 holds the record of another .*threads=1 there, 2 here"):
        train(config(*preview, "seeds=[0,1]", "threads=2"))
    assert len(list((tmp_path / "runs").rglob("seed=*"))) == 1


def test_missing_images_are_one_line(preview: list[str], tmp_path: Path) -> None:
    result = run(*preview[:-2], f"problem.data.path={tmp_path / 'nowhere'}", runs=tmp_path / "runs")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"{tmp_path / 'nowhere'}: no train*.parquet there")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["optimizer.dampening=1"],
            "unknown setting 'optimizer.dampening'.*optimizer.lr, optimizer.momentum",
        ),
        (["lr=1"], "Did you mean optimizer.lr?"),
        (["optimizer=sgd,kfac", "optimizer.damp=1"], "Did you mean optimizer.damping"),
        ([f"problem={PREVIEW}", "problem.data.pth=x"], "Did you mean problem.data.path"),
        (["training.epoch=1"], "training.channels_last, training.compile, training.epochs"),
    ],
)
def test_unknown_settings_are_refused_with_a_list(overrides: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        check_overrides(overrides, CONFIGS)


def test_settings_of_any_swept_optimizer_are_known() -> None:
    check_overrides([f"problem={PREVIEW}", "problem.data.path=/images"], CONFIGS)
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


def test_unknown_optimizer_lists_the_options_and_no_schema(tmp_path: Path) -> None:
    result = run("optimizer=sdg", runs=tmp_path)
    assert result.returncode != 0
    for name in CLASSES:
        assert name in result.stderr
    options = result.stderr.partition("Available options")[2]
    assert "schema" not in options.partition("Config search path")[0]
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


def test_an_absent_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="use device=cpu"):
        check_machine("cuda:0")
