"""The second edition's arms are trained where their records are read."""

import runpy
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from experiments.identity import run_path
from experiments.study.arms import PAPER, Arm
from experiments.study.decision import (
    ADAPTIVE,
    CONTROLS,
    CONVOLUTIONAL,
    EXACT,
    FIXED,
    GRID,
    RECIPE,
    TEST,
    WITHOUT,
    arm,
    exact,
)
from experiments.study.directions import CORRECTIONS
from experiments.study.variants import VARIANTS
from experiments.train import CONFIGS

RUN = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "run_decision.py"))
SOME = [
    *[*CONTROLS.values()][::4],
    arm("two levels", (1e-6, 3e-3, 0.0), TEST),
    GRID["one level"][1e-3, 1e-3, 0.9],
    *ADAPTIVE["two levels"].values(),
    *CONVOLUTIONAL.values(),
]


@pytest.mark.parametrize("trained", SOME, ids=lambda arm: arm.variant)
def test_an_arm_is_trained_where_its_record_is_read(trained: Arm) -> None:
    _, _, module, *overrides = RUN["command"](trained, ["tracking=none"])
    assert module == "experiments.train"
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", overrides)
        assert (
            run_path(config) == Path("runs/decision") / trained.problem / trained.optimizer / trained.variant
        )
    assert config.seeds == list(trained.own_seeds)
    of_the_mlp = {} if trained.apart else PAPER
    for key, value in (of_the_mlp | trained.settings).items():
        part, _, name = key.partition(".")
        assert config[part].get(name, value) == value


def test_the_grid_is_the_rules() -> None:
    assert {level: len(arms) for level, arms in GRID.items()} == {"one level": 32, "two levels": 32}
    assert len({each for arms in GRID.values() for each in arms.values()}) == 64
    spaces = {
        each.settings["optimizer.coarse"] for each in CONTROLS.values() if "optimizer.coarse" in each.settings
    }
    assert spaces < set(VARIANTS)
    assert len(spaces) == 14
    assert all(sorted(arms) == [1e-6, 1e-5, 1e-4, 1e-3, 1e-2] for arms in FIXED.values())


def test_each_arm_is_trained_once_and_all_of_them_although_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def status(arguments: list[str]) -> int:
        trained.append(arguments[4])
        return len(trained) == 1

    monkeypatch.setitem(RUN["train"].__globals__, "_status", status)
    with pytest.raises(SystemExit, match=r"the others are done: (kfac|two_level_kfac)$"):
        RUN["train"]([CONTROLS["one level"], CONTROLS["full"], CONTROLS["full"]], [])
    assert sorted(trained) == ["optimizer=kfac", "optimizer=two_level_kfac"]


def test_the_exact_arms_are_those_of_the_rules_and_their_recipe_s() -> None:
    for net, directions in EXACT.items():
        with initialize_config_dir(CONFIGS, version_base="1.3"):
            base = compose("train", ["optimizer=exact_natural_gradient", f"problem={net.problem}"])
            assert {key: base.optimizer[key] for key in RECIPE} == RECIPE
            assert base.training.epochs == net.epochs[-1]
            _, _, _, *overrides = RUN["command"](exact("galerkin", (1e-6, 0.3), net=net), [])
            config = compose("train", overrides)
            where = Path(net.problem) / "exact_natural_gradient" / "correction=galerkin,damping=1e-06"
            assert run_path(config) == "runs/decision" / where
        assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.momentum) == (0.3, 0, 0)
        assert directions.keys() == CORRECTIONS.keys()
        whole, blocks, *corrected = (len(arms) for arms in directions.values())
        assert whole == blocks == 3 * len(net.dampings)
        assert corrected == [4] * 4


def test_each_net_is_measured_where_its_table_is_read() -> None:
    places = set()
    for parts, measured in WITHOUT.items():
        _, _, module, *overrides = RUN["command"](measured, [], "experiments.dependencies")
        assert module == "experiments.dependencies"
        with initialize_config_dir(CONFIGS, version_base="1.3"):
            config = compose("train", overrides)
            assert run_path(config, seeds_apart=True) == Path("runs/decision") / measured.group
            places.add(run_path(config))
        assert [config.problem[part] for part in parts] == [False] * len(parts)
    assert len(places) == 8
