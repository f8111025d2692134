"""The words and the choice of the rules, on runs whose outcomes are known."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import pytest

from experiments.figures.study import decision
from experiments.figures.study.bound_figure import upper_bound_figure
from experiments.figures.study.decision import (
    chosen,
    controls_markdown,
    finalists,
    grid_markdown,
    paper_markdown,
    tuned_markdown,
)
from experiments.figures.study.dependencies import dependencies_markdown
from experiments.figures.study.hypotheses import (
    adaptive_markdown,
    convolutions_markdown,
    reconciled_markdown,
)
from experiments.figures.study.upper_bound import (
    alike_markdown,
    chosen_markdown,
    contestants,
    verdict_markdown,
)
from experiments.figures.study.words import compared, holm, together, word
from experiments.records import NoRecordsError, Run
from experiments.study.arms import Arm
from experiments.study.decision import (
    ADAPTIVE,
    CONTROLS,
    CONVOLUTIONAL,
    DEEP_LINEAR,
    EXACT,
    FIXED,
    GRID,
    PAPERS,
    RECONCILED,
    REPEATED,
    SELECTION,
    TEST,
    arm,
    exact,
)
from tests.figures.conftest import run_of


def run_with(outcome: float, test_loss: float, seeds: range) -> Run:
    """Five epochs; outcomes spread a little by seed."""
    rows = [
        {
            "seed": seed,
            "epoch": epoch,
            "train_loss": 1.0,
            "test_loss": test_loss * (1 + 0.001 * math.sin(seed * outcome)),
            "full_batch_loss": outcome * (1 + 0.001 * math.sin(seed / outcome)) if epoch == 5 else math.nan,
        }
        for seed in seeds
        for epoch in range(1, 6)
    ]
    return run_of(pd.DataFrame(rows).assign(seconds=1.0))


class Trained:
    """Each arm's outcome by the settings."""

    def __init__(self, runs: Mapping[Arm, Run]):
        self.runs = runs

    def run(self, wanted: Arm) -> Run:
        if wanted not in self.runs:
            raise NoRecordsError("not there")
        return self.runs[wanted]

    def arms(self, arms: Mapping[Any, Arm]) -> dict[Any, Run]:
        return {name: self.run(each) for name, each in arms.items()}


@pytest.mark.parametrize(
    ("low", "high", "p", "expected"),
    [
        (0.5, 0.96, 0.0, "ahead"),
        (0.955, 0.969, 0.0, "ahead"),
        (0.955, 0.969, 0.06, "equal"),
        (0.5, 0.96, 0.06, "undecided"),
        (0.96, 1.04, 0.0, "equal"),
        (0.94, 1.04, 0.0, "undecided"),
        (1.04, 1.2, 0.0, "behind"),
        (1.04, 1.2, 0.06, "undecided"),
        (math.nan, math.nan, math.nan, "undecided"),
    ],
)
def test_words(low: float, high: float, p: float, expected: str) -> None:
    assert word(low, high, p) == expected


def test_holm() -> None:
    """0.01·3, 0.02·2 and 0.5; no smaller one after a larger one."""
    assert holm([0.02, 0.5, 0.01]) == pytest.approx([0.04, 0.5, 0.03])
    assert holm([0.03, 0.04]) == pytest.approx([0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    adjusted = holm([0.01, math.nan, 0.5])
    assert (adjusted[0], adjusted[2]) == pytest.approx((0.02, 0.5))
    assert math.isnan(adjusted[1])


def test_a_comparison_is_of_the_pairs_that_are_there() -> None:
    first, second = pd.Series([1.0, 1.1, math.nan, 1.3]), pd.Series([2.0, 2.1, 2.2, 2.7])
    pair = compared(first, second)
    assert (pair["seeds"], pair["left_out"], pair["below"], pair["word"]) == (3, 1, 3, "ahead")
    assert pair["p"] < 0.01
    several = together([pair, pair])
    assert [each["p"] for each in several] == pytest.approx([2 * pair["p"]] * 2)


def test_each_outcome_chooses_its_own_settings_and_other_seeds_compare_them() -> None:
    best, also = (1e-4, 1e-3, 0.9), (1e-6, 3e-3, 0.0)
    runs = {
        each: run_with(0.1 if setting == best else 0.2, 0.1 if setting == also else 0.2, SELECTION)
        for arms in GRID.values()
        for setting, each in arms.items()
    }
    ends = {
        ("one level", best): 0.2,
        ("two levels", best): 0.1,
        ("one level", also): 0.4,
        ("two levels", also): 0.4,
    }
    runs |= {arm(level, setting, TEST): run_with(end, end, TEST) for (level, setting), end in ends.items()}
    study: Any = Trained(runs)
    for level in GRID:
        assert chosen(study, level, "full-batch training loss") == best
        assert chosen(study, level, "test loss") == also
    assert set(finalists(study).values()) <= set(runs)
    assert all(each.own_seeds == range(5, 20) for each in finalists(study).values())
    lines = tuned_markdown(study).splitlines()[2:]
    assert ["ahead" in line for line in lines] == [True, True, False] + [False] * 3
    assert "0.500 [0.500, 0.500]" in lines[0] or "0.500 [0.499, 0.500]" in lines[0]
    assert "λ 0.0001, η 0.001, μ 0.9" in lines[0]
    assert "0.1000" in grid_markdown(study)
    runs.pop(GRID["one level"][best])
    with pytest.raises(NoRecordsError):
        finalists(study)


def test_the_paper_s_settings_and_how_well_they_repeat() -> None:
    runs = {
        PAPERS["one level"]: run_with(0.2, 0.2, range(10)),
        PAPERS["two levels"]: run_with(0.1, 0.3, range(10)),
    }
    runs |= {REPEATED[level]: run_with(0.2 * 1.1, 0.2, SELECTION) for level in REPEATED}
    first, second, _ = paper_markdown(Trained(runs)).splitlines()[4:]  # pyright: ignore[reportArgumentType]
    assert "0.500 [0.500, 0.50" in first
    assert "ahead" in first
    assert "behind" in second
    repeated = [float(cell) for cell in first.split("|")[-3:-1]]
    own = math.log(1.1) + pd.Series(
        [run_with(0.22, 1, SELECTION).full_batch_losses()[s] / 0.22 for s in SELECTION]
    ).map(math.log)
    base = pd.Series([run_with(0.2, 1, SELECTION).full_batch_losses()[s] / 0.2 for s in SELECTION]).map(
        math.log
    )
    assert repeated[0] == pytest.approx((own - base).std(), abs=6e-4)


def test_a_control_is_compared_with_the_full_direction_at_its_kind_of_length() -> None:
    runs = {
        each: run_with(0.1 if "constant" in name else 0.2, 0.3, range(10)) for name, each in CONTROLS.items()
    }
    text = controls_markdown(Trained(runs))  # pyright: ignore[reportArgumentType]
    scheduled = text.split("against full, scheduled")[1].split("against full, constant")[0]
    assert "identity, scheduled" in scheduled
    assert "identity, constant" not in scheduled
    one_level = text.split("against one level")[1].split("against full, scheduled")[0]
    assert "identity, constant" in one_level
    assert decision.OUTCOMES.keys() >= {"full-batch training loss", "test loss"}


def run_to(epochs: Mapping[int, float], seeds: range) -> Run:
    """Outcomes after epochs, spread a little by seed."""
    rows = [
        {
            "seed": seed,
            "epoch": epoch,
            "train_loss": 1.0,
            "test_loss": 1.0,
            "full_batch_loss": epochs[epoch] * (1 + 0.001 * math.sin(seed / epochs[epoch]))
            if epoch in epochs
            else math.nan,
            "block_cosine": 0.9,
            "block_ratio": 50.0,
        }
        for seed in seeds
        for epoch in range(1, 101)
    ]
    return run_of(pd.DataFrame(rows).assign(seconds=1.0))


@pytest.mark.parametrize("last", [0.9, 1.1])
def test_the_upper_bound_needs_all_three_epochs(last: float) -> None:
    """The whole one's best settings differ by epoch; blocks' do not."""
    early, late, blocks = (1e-6, 0.1), (1e-2, 1.0), (1e-4, 0.3)
    runs = {
        each: run_to({5: 2.0, 20: 2.0, 100: 2.0}, SELECTION)
        for c in ("full", "block_diagonal")
        for each in EXACT[DEEP_LINEAR][c].values()
    }
    for seeds in (SELECTION, TEST):
        runs[exact("full", early, seeds)] = run_to({5: 0.5, 20: 0.5, 100: 2.0}, seeds)
        runs[exact("full", late, seeds)] = run_to({5: 2.0, 20: 2.0, 100: last}, seeds)
        runs[exact("block_diagonal", blocks, seeds)] = run_to({5: 1.0, 20: 1.0, 100: 1.0}, seeds)
    study: Any = Trained(runs)
    assert set(contestants(study, DEEP_LINEAR)) == {
        exact("full", early, TEST),
        exact("full", late, TEST),
        exact("block_diagonal", blocks, TEST),
    }
    text = verdict_markdown(study, DEEP_LINEAR)
    assert ("can help" in text) == (last < 0.95)
    assert text.count("| test loss") == 3
    assert ("is not shown" in text) == (last > 0.95)
    table = chosen_markdown(study, DEEP_LINEAR)
    loss, cosine, length = upper_bound_figure(study).axes
    assert [line.get_label() for line in loss.lines] == ["full", "block diagonal"]
    assert [line.get_label() for line in length.lines] == ["along full", "along block diagonal"]
    assert set(cosine.lines[0].get_ydata()) == {0.9}  # pyright: ignore[reportArgumentType]
    assert "Not trained yet: additive, galerkin, residual_corrected, inverse_of_sum." in table
    assert "No λ and factor" in alike_markdown(study, DEEP_LINEAR)
    runs[exact("full", blocks, TEST)] = run_to({5: 0.5, 20: 0.25, 100: 0.3}, TEST)
    runs[exact("full", blocks)] = run_to({5: 0.4, 20: 0.4, 100: 0.3}, SELECTION)
    alike = alike_markdown(study, DEEP_LINEAR).splitlines()[4:]
    assert [line.split("|")[1].strip() for line in alike] == ["0.0001"] * 6
    assert "0.250 [0.2" in alike[1]
    assert "1e-06" in table


@pytest.mark.parametrize(("one_start", "works"), [(0.101, True), (0.108, False), (0.7, False)])
def test_adaptive_damping_must_reach_the_best_fixed_one_from_every_start(
    one_start: float, works: bool
) -> None:
    runs = {
        each: run_with(0.1 if damping == 1e-4 else 0.2, 0.1, each.own_seeds)
        for arms in FIXED.values()
        for damping, each in arms.items()
    }
    for arms in ADAPTIVE.values():
        for start, each in arms.items():
            runs[each] = run_with(one_start if start == 1.0 else 0.1, 0.1, each.own_seeds)
    text = adaptive_markdown(Trained(runs))  # pyright: ignore[reportArgumentType]
    assert ("**works**" in text) == works
    assert ("**does not work**" in text) != works
    table = [
        [cell.strip() for cell in line.split("|")] for line in text.splitlines() if "training loss" in line
    ]
    assert {cells[6] for cells in table} == {"0.0001"}
    runs.pop(FIXED["two levels"][1e-2])
    with pytest.raises(NoRecordsError):
        adaptive_markdown(Trained(runs))  # pyright: ignore[reportArgumentType]


def test_coarse_matrices_are_compared_with_one_level_after_the_last_epoch() -> None:
    ends = dict(zip(CONVOLUTIONAL, (0.5, 0.25, 0.5, 0.51), strict=True))
    runs = {}
    for name, each in CONVOLUTIONAL.items():
        rows = [
            {
                "seed": seed,
                "epoch": epoch,
                "train_loss": ends[name] * (1 + 0.001 * seed**2 / ends[name]) * (3 - epoch),
            }
            | {"test_accuracy": 0.75, "nu": 0.5, "coarse_ratio": 0.1 * epoch, "coarse_negative": 7.0}
            for seed in each.own_seeds
            for epoch in (1, 2)
        ]
        runs[each] = run_of(pd.DataFrame(rows), device="a machine")
    text = convolutions_markdown(Trained(runs))  # pyright: ignore[reportArgumentType]
    shape, losses, errors, machines = text.split("\n\n")[1:]
    assert "0.250, 0.250, 0.250 | 0.5 | 0.2" in shape
    first, second, third = losses.splitlines()[2:]
    assert ("0.50" in first, "ahead" in first) == (True, True)
    assert "undecided" in second  # which the words for more seeds call equal
    assert "behind" not in third
    assert errors.count("1.000 [1.000, 1.000]") == 3
    assert machines.count("a machine, 1 thread") == 4


def test_forms_are_compared_with_one_level_at_the_same_damping() -> None:
    runs = {
        each: run_with(
            {1e-2: 0.2, 1e-6: 0.05}[damping] * (1 if name == "one level" else 0.5), 0.1, each.own_seeds
        )
        for damping, arms in RECONCILED.items()
        for name, each in arms.items()
    }
    text = reconciled_markdown(Trained(runs))  # pyright: ignore[reportArgumentType]
    assert [text.count(f"λ {damping}, full-batch") for damping in ("0.01", "1e-06")] == [1, 1]
    lines = [line for line in text.splitlines() if "additive, ones, identity" in line]
    assert [("ahead" in line, "0.50" in line) for line in lines[::2]] == [(True, True)] * 2
    assert text.count("galerkin, krylov, consistent") == 2
    assert "Not trained yet" not in text
    runs.pop(RECONCILED[1e-2]["galerkin_krylov_consistent"])
    text = reconciled_markdown(Trained(runs))  # pyright: ignore[reportArgumentType]
    assert text.endswith("Not trained yet: galerkin, krylov, consistent at λ 0.01.")


def test_a_net_may_need_curvature_between_layers_if_all_seeds_are_low_at_one_damping() -> None:
    class Measured(Trained):
        def measurement(self, kind: str, group: str, table: str) -> pd.DataFrame:
            low = 1.0 if "layer_norm=False" in group else 0.0
            rows = [
                {"seed": seed, "epoch": epoch, "damping": damping, "ratio": 3.0, "loss": 1.0}
                | {"cosine": 0.9 - low * (0.3 if damping == 1e-2 or seed == 0 else 0.1)}
                for seed in (0, 1, 2)
                for epoch in (0, 10)
                for damping in (1e-4, 1e-2)
            ]
            return pd.DataFrame(rows)

    text = dependencies_markdown(Measured({}))  # pyright: ignore[reportArgumentType]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[4:]]
    assert len(lines) == 8
    assert [line[1] == "no" for line in lines] == [line[-1] == "yes" for line in lines]
    assert lines[0][3] == "0.90, 0.90, 0.90; 3.0"
