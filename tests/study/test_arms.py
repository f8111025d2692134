"""What the study trains, reads and has committed is one list of arms."""

import json
import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from experiments import coarse_matrix, microscope
from experiments.identity import identity, run_path
from experiments.measurement import measured_directory
from experiments.overrides import check_overrides
from experiments.study.arms import BEST, CONVOLUTIONS, MICROSCOPE, PAPER, TRAININGS, Arm
from experiments.study.variants import VARIANTS
from experiments.train import CONFIGS

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "results" / "study"
STUDY = runpy.run_path(str(ROOT / "scripts" / "run_study.py"))


def provenance(arm: Arm) -> dict[str, Any]:
    path = RECORDS / arm.problem / arm.optimizer / arm.variant / "provenance.json"
    return json.loads(path.read_text())["config"]


def test_each_committed_training_is_an_arm() -> None:
    records = {path.parent for path in (RECORDS / "deep_linear_mlp").rglob("provenance.json")}
    assert records == {RECORDS / arm.problem / arm.optimizer / arm.variant for arm in TRAININGS}
    assert len(records) == len({arm.name for arm in TRAININGS}) == 126


def test_the_records_have_their_arms_settings() -> None:
    for arm in TRAININGS:
        config = provenance(arm)
        assert config["optimizer"]["name"] == arm.optimizer
        assert config["seeds"] == list(range(arm.seeds))
        for key, value in (PAPER | arm.settings).items():
            part, _, name = key.partition(".")
            assert config[part].get(name, value) == value, (arm, key)


@pytest.mark.parametrize("arm", TRAININGS[::9], ids=lambda arm: arm.name)
def test_an_arm_is_trained_where_its_record_is_read(arm: Arm) -> None:
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", [f"arm={arm.name}", "runs=results/study"])
        assert run_path(config) == Path("results/study") / arm.problem / arm.optimizer / arm.variant
        assert identity(config) == provenance(arm)


def test_settings_given_beside_an_arm_win() -> None:
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", [f"arm={TRAININGS[0].name}", "optimizer.damping=7", "seeds=[3]"])
    assert (config.optimizer.damping, config.seeds) == (7, [3])


def test_the_finer_line_of_learning_rates_is_at_a_winner_of_the_grid() -> None:
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        best = compose("train", ["optimizer=kfac", "recipe=deep_linear_mlp/kfac_best"]).optimizer
    assert {key: best[key] for key in BEST} == BEST


def test_the_arms_coarse_spaces_exist() -> None:
    spaces = {arm.settings["optimizer.coarse"] for arm in TRAININGS if "optimizer.coarse" in arm.settings}
    assert spaces < set(VARIANTS)


@pytest.mark.parametrize(
    ("module", "arm"),
    [*((microscope, arm) for arm in MICROSCOPE.values()), (coarse_matrix, CONVOLUTIONS)],
    ids=["one level", "two levels", "convolutions"],
)
def test_a_measured_arm_s_records_are_where_they_are_read(module: Any, arm: Arm) -> None:
    *settings, seeds = STUDY["one_by_one"](arm)
    assert seeds == f"seeds={','.join(f'[{seed}]' for seed in range(arm.seeds))}"
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", [*settings, "seeds=[1]", "runs=elsewhere"])
        kind = module.KIND
        path = measured_directory(config, kind, 1).path
    assert path == Path("elsewhere") / kind / arm.group / "seed=1"
    assert len(list((RECORDS / kind / arm.group).iterdir())) == arm.seeds


def test_arms_are_a_setting_of_the_command_line() -> None:
    check_overrides(["-m", "arm=glob(*)", "hydra/launcher=processes", "tracking=none"], CONFIGS)
    check_overrides([f"arm={TRAININGS[0].name}", "optimizer.damping=1"], CONFIGS)


def test_the_study_goes_on_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=int("experiments.train" in command))

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit, match=r"the other steps are done: experiments\.train$"):
        STUDY["main"](["tracking=none"])
    assert len(commands) == len(STUDY["STEPS"])
    assert all(command[-2:] == ["hydra/launcher=processes", "tracking=none"] for command in commands)
