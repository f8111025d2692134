"""The command line as it is typed: what is refused, in one line and before any training, and what then trains."""

import json
import math
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from experiments import select
from experiments.command_line import CONFIGS, launch
from experiments.overrides import composed, late_settings, members
from experiments.train import check, main, train

TINY = ["problem.depth=2", "problem.width=4", "problem.train_samples=64", "problem.test_samples=8"]
SHORT = [*TINY, "training.epochs=2", "seeds=[0]", "tracking=none"]


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``typed(*arguments)`` is ``python -m experiments.train`` with them."""
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def typed(*arguments: str, runs: str = str(tmp_path / "runs")) -> None:
        monkeypatch.setattr(sys, "argv", ["train", *arguments, f"runs={runs}"])
        launch(main, check)

    return typed


@pytest.fixture(scope="module")
def kfac() -> DictConfig:
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return compose("train", overrides=["optimizer=kfac", *SHORT])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimizer.lr", -1, "optimizer.lr must be finite and not negative, got -1.0"),
        ("optimizer.lr", math.nan, "optimizer.lr must be finite"),
        ("optimizer.weight_decay", math.inf, "optimizer.weight_decay must be finite"),
        ("optimizer.momentum", 1, "optimizer.momentum must be at least 0 and less than 1, got 1.0"),
        ("optimizer.momentum", math.nan, "optimizer.momentum must be"),
        ("optimizer.damping", math.nan, "optimizer.damping must be finite"),
        ("optimizer.kl_clip", math.inf, "optimizer.kl_clip must be positive and finite"),
        ("optimizer.factor_interval", 0, "factor_interval must be a positive integer, got 0"),
        ("optimizer.inverse", "eigne", "unknown inverse 'eigne': choose from eigen, tikhonov"),
        ("training.epochs", 0, "training.epochs must be positive, got 0"),
        ("training.lr_decay", math.nan, "training.lr_decay must be positive and finite"),
        ("training.milestones", [0.4, 0.4], "training.milestones must increase"),
        ("problem.width", 0, "problem.width must be positive, got 0"),
        ("seeds", [], r"seeds must be distinct and not empty, got \[\]"),
        ("seeds", [1, 1], r"seeds must be distinct and not empty, got \[1, 1\]"),
        ("threads", 0, "threads must be positive, got 0"),
        ("hours", 0, "hours must be positive and finite, got 0.0"),
        ("device", "zzz", "device=zzz: no device of torch"),
        ("device", "cuda:1", "torch finds no GPU here: use device=cpu"),
        ("training.epochs", "???", "without a value: training.epochs"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    key: str, value: Any, message: str, kfac: DictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = deepcopy(kfac)
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        assert check(config) == 1
        OmegaConf.update(config, key, value)
        with pytest.raises(ValueError, match=message):
            check(config)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("optimizer.lr=-1", "optimizer.lr must be finite and not negative, got -1.0"),
        ("optimizer=sdg", "Could not find 'optimizer/sdg' Available options in 'optimizer': adam "),
        ("optimizer.lr=x", "Value 'x' of type 'str' could not be converted to Float"),
        ("~optimizer", "~optimizer: a training needs a choice of optimizer="),
        ("tracking=null", "a training needs a choice of tracking= (tracking=none turns it off)"),
        ("tracking.mode=onlin", "unknown tracking.mode 'onlin': choose from offline, online, disabled"),
        ("optimizer.name=adam", "unknown setting 'optimizer.name': it belongs to the optimizer"),
        ("++optimizer.name=adam", "unknown setting 'optimizer.name'"),
        ("problem.one_record_per_seed=true", "unknown setting 'problem.one_record_per_seed'"),
    ],
)
def test_a_user_s_error_is_one_line_before_any_training(
    argument: str, message: str, typed, tmp_path: Path
) -> None:
    tracked = SHORT[:-1] if "tracking" in argument else SHORT
    with pytest.raises(SystemExit) as refused:
        typed(*tracked, argument)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_a_bad_member_is_refused_before_the_first_trains(typed, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"optimizer\.lr must be finite and not negative, got -1"):
        typed("-m", "optimizer.lr=1e-2,-1", *SHORT)
    with pytest.raises(SystemExit, match=r"optimizer=sgd .*has no setting 'optimizer.damping'"):
        typed("-m", "optimizer=kfac,sgd", "optimizer.damping=1", *SHORT)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("runs", ["/dev/null", "/dev/null/below"])
def test_a_place_without_room_for_records_is_refused(runs: str, typed) -> None:
    with pytest.raises(SystemExit, match=f"runs={runs}: /dev/null is not a directory"):
        typed(*SHORT, runs=runs)


def test_an_error_of_one_training_is_one_line_too(typed, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="unknown activation 'rleu': choose from"):
        typed(*SHORT, "problem.activation=rleu")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="unknown activation 'rleu'"):
        typed(*SHORT, "problem.activation=rleu")


def test_the_chosen_optimizers_settings_work_although_the_default_has_them_not(typed, tmp_path: Path) -> None:
    typed("-m", "optimizer=kfac,two_level_kfac", "optimizer.factor_interval=7", *SHORT)
    made = [json.loads(path.read_text()) for path in sorted(tmp_path.rglob("provenance.json"))]
    assert [each["config"]["optimizer"]["name"] for each in made] == ["kfac", "two_level_kfac"]
    assert all(each["complete"] and each["config"]["optimizer"]["factor_interval"] == 7 for each in made)


def test_only_settings_of_swept_groups_wait_for_the_choice() -> None:
    given = [
        "optimizer=kfac,sgd",
        "optimizer.lr=1e-2",
        "optimizer.damping=1,2",
        "seeds=[0,1]",
        "problem.depth=2",
    ]
    late = ["optimizer=kfac,sgd", "optimizer.lr=choice(1e-2)", *given[2:]]
    assert late_settings(given) == late
    assert late_settings(["optimizer=kfac", *given[1:]]) == ["optimizer=kfac", *given[1:]]


def test_members_are_composed_as_hydra_does() -> None:
    sweep = ["optimizer=sgd,kfac", "optimizer.lr=1e-2,1e-3", "seeds=[0],[1]", "problem.depth=3", "+sweep.x=1"]
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        choices, _ = members([*sweep[:-1], "training.milestones=[0.5]"])
        assert len(choices) == 8
        assert list(composed(choices)) == [compose("train", overrides=choice) for choice in choices]


def test_a_damaged_record_is_named_and_trained_again(typed, tmp_path: Path) -> None:
    typed(*SHORT)
    (provenance,) = tmp_path.rglob("provenance.json")
    checkpoint = provenance.with_name("checkpoint.pt")
    unfinished = provenance.read_text().replace('"complete": true', '"complete": false')
    for file, content in ((provenance, ""), (provenance, "[1]"), (checkpoint, "PK half")):
        provenance.write_text(unfinished)
        file.write_text(content)
        with pytest.raises(SystemExit, match=rf"{file}.*rerun=true"):
            typed(*SHORT)
        typed(*SHORT, "rerun=true")
        assert json.loads(provenance.read_text())["complete"]
        assert not checkpoint.exists()


def test_another_training_s_checkpoint_is_named(typed, tmp_path: Path) -> None:
    typed(*SHORT)
    (provenance,) = tmp_path.rglob("provenance.json")
    provenance.write_text(provenance.read_text().replace('"complete": true', '"complete": false'))
    torch.save({"epoch": 1}, provenance.with_name("checkpoint.pt"))
    with pytest.raises(SystemExit, match=r"checkpoint.pt is of another training .*rerun=true"):
        typed(*SHORT)


def test_a_time_limit_leaves_what_goes_on(typed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed("-m", *SHORT, "seeds=[0],[1]", "hours=1e-9")
    assert capsys.readouterr().out.count("not trained, hours=1e-09 are over") == 2
    assert not list(tmp_path.rglob("provenance.json"))
    typed("-m", *SHORT, "seeds=[0],[1]", "hours=1")
    assert len(list(tmp_path.rglob("provenance.json"))) == 2


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("seeds=[]", r"seeds must be distinct and not empty, got \[\]"),
        ("seeds=[2,2]", "seeds must be distinct"),
        ("training.epochs=0", "training.epochs must be positive"),
        ("device=zzz", "device=zzz: no device of torch"),
        ("optimizer.lr=-1,1", "optimizer.lr must be finite and not negative"),
    ],
)
def test_select_refuses_the_same(argument: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"error: {message}"):
        select.main(["optimizer=sgd", argument, f"runs={tmp_path}", "--list"])


def test_a_name_is_the_option_s() -> None:
    """So that no other problem's or optimizer's record is taken for this one's."""
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        for group in ("problem", "optimizer"):
            for file in (Path(CONFIGS) / group).glob("*.yaml"):
                problem = (
                    "resnet20_cifar10_preview" if file.stem == "two_level_variant" else "deep_linear_mlp"
                )
                config = compose("train", overrides=[f"problem={problem}", f"{group}={file.stem}"])
                assert config[group].name == file.stem


def test_a_training_by_itself_has_all_its_hours(tmp_path: Path) -> None:
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", overrides=[*SHORT, f"runs={tmp_path}", "hours=0.1"])
        train(config)
    assert math.isfinite(config.hours)
    assert len(list(tmp_path.rglob("curves.csv"))) == 1
