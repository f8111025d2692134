"""The arms that the verdict is decided by, as results/study/rules.md states them; below ``results/decision``."""

from dataclasses import replace
from itertools import combinations, product
from typing import Any, NamedTuple

from experiments.study.arms import (
    FORMED,
    FULL,
    LEVELS,
    ONE_LEVEL,
    PAPER,
    PARTS_OF_A_VIT,
    Arm,
    one,
    two,
    variant,
)

SELECTION, TEST = range(5), range(5, 20)
"""Seeds that choose a level's settings, and those that compare the chosen ones."""
DAMPINGS, RATES, MOMENTA = (1e-3, 1e-4, 1e-5, 1e-6), (3e-4, 1e-3, 3e-3, 1e-2), (0.0, 0.9)
Setting = tuple[float, float, float]
"""λ, η and μ."""


def arm(level: str, setting: Setting, seeds: range = SELECTION) -> Arm:
    damping, rate, momentum = setting
    chosen = LEVELS[level](damping=damping, lr=rate, momentum=momentum)
    return replace(chosen, seeds=len(seeds), first=seeds.start)


# The paper's settings, and beside how many other seeds they are trained again: what rounding does to the outcome.
PAPERS = {level: build() for level, build in LEVELS.items()}
REPEATED = {level: build(seeds=len(SELECTION)) for level, build in LEVELS.items()}

# Hypothesis 1: equal tuning.
GRID: dict[str, dict[Setting, Arm]] = {
    level: {setting: arm(level, setting) for setting in product(DAMPINGS, RATES, MOMENTA)} for level in LEVELS
}

# Hypothesis 2: at the paper's settings, directions whose length no coarse matrix of their own decides.
DIRECTIONS = (
    FULL,
    "identity",
    "diagonal",
    "permuted",
    "signs",
    "signs_2",
    "signs_3",
    "gaussian",
    "gaussian_2",
    "gaussian_3",
)
LENGTHS = ("scheduled", "constant")
CONTROLS: dict[str, Arm] = {
    ONE_LEVEL: PAPERS["one level"],
    FULL: PAPERS["two levels"],
    **{
        f"{direction}, {length}": variant(f"{direction}_{length}")
        for length in LENGTHS
        for direction in (DIRECTIONS if length == "scheduled" else DIRECTIONS[:4])
    },
}

# Hypothesis 3: the upper bound, exact natural gradient; first what the rule compares, then the corrections.
FACTORS = (0.1, 0.3, 1.0)
CORRECTED = ("additive", "galerkin", "residual_corrected", "inverse_of_sum")
RECIPE: dict[str, Any] = {
    "correction": "full",
    "lr": 0.3,
    "damping": 1e-4,
}  # configs/experiment/deep_linear_mlp.yaml
Step = tuple[float, float]
"""λ, and the factor on the model-optimal step."""


class Net(NamedTuple):
    """A problem that the upper bound is asked of, the λ that are tried, the epochs after which it is compared, and
    the λ and factors of the corrections."""

    problem: str
    dampings: tuple[float, ...]
    epochs: tuple[int, ...]
    corrected: tuple[tuple[float, ...], tuple[float, ...]]

    def steps(self, correction: str) -> list[Step]:
        return list(product(*(self.corrected if correction in CORRECTED else (self.dampings, FACTORS))))


MIDDLE = ((1e-4, 1e-2), (0.3, 1.0))
DEEP_LINEAR = Net("deep_linear_mlp", (1e-6, 1e-4, 1e-2, 1.0), (5, 20, 100), MIDDLE)
LAYER_NORM = Net("layer_norm_mlp", (1e-4, 1e-2, 1.0), (5, 10, 20), MIDDLE)


def exact(correction: str, step: Step, seeds: range = SELECTION, net: Net = DEEP_LINEAR) -> Arm:
    damping, factor = step
    own = {"correction": correction, "lr": factor, "damping": damping}
    changes = tuple(sorted((key, value) for key, value in own.items() if value != RECIPE[key]))
    return Arm("exact_natural_gradient", changes, len(seeds), net.problem, seeds.start)


WHOLE, BLOCKS = "full", "block_diagonal"
EXACT: dict[Net, dict[str, dict[Step, Arm]]] = {
    net: {
        correction: {step: exact(correction, step, net=net) for step in net.steps(correction)}
        for correction in (WHOLE, BLOCKS, *CORRECTED)
    }
    for net in (DEEP_LINEAR, LAYER_NORM)
}

# Hypothesis 4: a damping that adapts itself, and the fixed ones at the same η and μ.
STARTS = (1e-6, 1e-4, 1e-2, 1.0)
ADAPTIVE: dict[str, dict[float, Arm]] = {
    level: {start: build(adaptive_damping=True, damping=start, seeds=len(SELECTION)) for start in STARTS}
    for level, build in LEVELS.items()
}
FIXED: dict[str, dict[float, Arm]] = {
    level: {
        damping: GRID[level][damping, PAPER["optimizer.lr"], PAPER["optimizer.momentum"]]
        for damping in DAMPINGS
    }
    | {PAPER["optimizer.damping"]: PAPERS[level]}
    for level in LEVELS
}

# Hypothesis 5: coarse matrices of a ResNet20, each seed with a record of its own.
CONVOLUTIONAL: dict[str, Arm] = {
    name: replace(own, problem="resnet20_cifar10_short", seeds=3, apart=True)
    for name, own in {
        ONE_LEVEL: one(),
        "two levels": two(),
        "two levels, exact coarse Fisher": two(coarse_fisher="exact"),
        "two levels, the scale of the authors' code": variant("authors_scale"),
    }.items()
}

# Hypothesis 6: Koroko et al.'s forms, bases and dampings, at the paper's λ and at the smallest of the grid.
RELATIVES = ("foof", "empirical_kfac")
RECONCILED: dict[float, dict[str, Arm]] = {
    damping: {ONE_LEVEL: base}
    | {name: replace(one(damping=damping, seeds=len(SELECTION)), optimizer=name) for name in RELATIVES}
    | {name: variant(name, damping=damping, seeds=len(SELECTION)) for name in names}
    for damping, base, names in (
        (PAPER["optimizer.damping"], PAPERS["one level"], FORMED),
        (DAMPINGS[-1], FIXED["one level"][DAMPINGS[-1]], [name for name in FORMED if "_ones_" in name]),
    )
}

# Hypothesis 7: the parts of a small ViT, measured while Adam trains it; those that are left out by their names.
WITHOUT: dict[tuple[str, ...], Arm] = {
    parts: Arm("adam", tuple((part, False) for part in parts), 3, "vit_cifar10", apart=True)
    for number in range(len(PARTS_OF_A_VIT) + 1)
    for parts in combinations(PARTS_OF_A_VIT, number)
}
