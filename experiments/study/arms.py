"""The study's arms, declared once: ``experiments.train arm=...`` trains them, the questions read their records."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

# What arms change, at the paper's values for the MLP. A weight of 0 is one level.
PAPER: dict[str, Any] = {
    "optimizer.lr": 1e-3,
    "optimizer.momentum": 0.9,
    "optimizer.damping": 1e-2,
    "optimizer.kl_clip": 1e-3,
    "optimizer.adaptive_damping": False,
    "optimizer.coarse": "full",
    "optimizer.coarse_fisher": "kronecker",
    "optimizer.coarse_weight": 1.0,
    "problem.depth": 64,
    "problem.batch_norm": True,
    "problem.activation": "identity",
    "training.epochs": 100,
}
PAPER_SEEDS = 5
PARTS_OF_A_VIT = ("residual", "layer_norm", "attention")
OTHERS = ("optimizer.correction", *(f"problem.{part}" for part in PARTS_OF_A_VIT))
KEYS = {key.rpartition(".")[2]: key for key in (*PAPER, *OTHERS)}


@dataclass(frozen=True)
class Arm:
    """An optimizer with ``changes``, the settings that are not the paper's, on ``seeds`` seeds of a problem, from
    ``first`` on; ``apart`` if each leaves a record of its own."""

    optimizer: str
    changes: tuple[tuple[str, Any], ...] = ()
    seeds: int = 10
    problem: str = "deep_linear_mlp"
    first: int = 0
    apart: bool = False

    @property
    def name(self) -> str:
        """Of the option ``arm=...`` on the command line, whose grammar keeps ``=`` and ``,`` to itself."""
        return "+".join([self.optimizer, *(f"{key}:{value}" for key, value in self.changes)])

    @property
    def own_seeds(self) -> range:
        return range(self.first, self.first + self.seeds)

    @property
    def variant(self) -> str:
        """The directory of its record, or of those of its seeds."""
        seeds = self.own_seeds
        own = () if self.apart or seeds == range(PAPER_SEEDS) else (("seeds", "-".join(map(str, seeds))),)
        return _variant((*self.changes, *own))

    @property
    def group(self) -> str:
        """Where its seeds have a record each: ``<problem>/<optimizer>/<variant>``."""
        return f"{self.problem}/{self.optimizer}/{_variant(self.changes)}"

    @property
    def settings(self) -> dict[str, Any]:
        """The changes by the full names of the settings."""
        return {KEYS[key]: value for key, value in self.changes}

    @property
    def overrides(self) -> list[str]:
        """All but the seeds as arguments of the command line."""
        choices = {"problem": self.problem, "optimizer": self.optimizer, **self.settings}
        return [f"{key}={value}" for key, value in choices.items()]


def _variant(changes: tuple[tuple[str, Any], ...]) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(changes)) or "paper"


def _arm(optimizer: str, seeds: int = 10, **settings: Any) -> Arm:
    changes = tuple((key, value) for key, value in sorted(settings.items()) if value != PAPER[KEYS[key]])
    return Arm(optimizer, changes, seeds)


def one(**settings: Any) -> Arm:
    return _arm("kfac", **settings)


def two(**settings: Any) -> Arm:
    return _arm("two_level_kfac", **settings)


def variant(coarse: str, **settings: Any) -> Arm:
    """Two levels with one of ``experiments.study.variants.VARIANTS`` as coarse space."""
    return _arm("two_level_variant", coarse=coarse, **settings)


def variants(spaces: Mapping[str, str], **settings: Any) -> dict[str, Arm]:
    """One level and coarse spaces, all at the same settings."""
    own = {label: variant(coarse, **settings) for label, coarse in spaces.items()}
    return {ONE_LEVEL: one(**settings)} | own


LEVELS: dict[str, Callable[..., Arm]] = {"one level": one, "two levels": two}
ONE_LEVEL, FULL = "one level", "full"
CONTROLS = {
    FULL: "full",
    "exact": "exact",
    "diagonal": "diagonal",
    "λI only": "damping_only",
    "identity, same length": "identity",
    "diagonal, same length": "diagonal_matched",
    "permuted, same length": "permuted",
}
BASES = {
    FULL: "full",
    "signs, draw 1": "signs",
    "signs, draw 2": "signs_2",
    "signs, draw 3": "signs_3",
    "Gaussian, draw 1": "gaussian",
    "Gaussian, draw 2": "gaussian_2",
    "Gaussian, draw 3": "gaussian_3",
}
FORMED = [
    f"{form}_{basis}_{damping}"
    for form in ("additive", "galerkin")
    for basis in ("ones", "smallest", "largest", "residual", "krylov")
    for damping in ("identity", "consistent")
]
"""Corrections of the forms and bases of Koroko et al., see ``experiments.study.forms``."""
TIMES = {
    FULL: "full",
    "first step only": "first_step",
    "epoch 1 only": "first_epoch",
    "after epoch 5 only": "after_epoch_5",
}

# Questions 1, 2 and 4.
OFF_DIAGONAL, ONES_VECTOR, INITIAL_KICK = variants(CONTROLS), variants(BASES), variants(TIMES)

# Question 3: the correction's weight with two dampings of the coarse matrix, and another λ for both levels.
DAMPINGS = {"λI": "full", "λ diag(n)": "consistent"}
CLIPPINGS = {"with clipping": 1e-3, "without clipping": None}
WEIGHTS = {
    clipping: {
        damping: {0.0: one(kl_clip=kl_clip)}
        | {weight: variant(coarse, kl_clip=kl_clip, coarse_weight=weight) for weight in (0.25, 0.5, 1.0)}
        for damping, coarse in DAMPINGS.items()
    }
    for clipping, kl_clip in CLIPPINGS.items()
}
LAMBDAS = {
    level: {value: build(damping=value) for value in (1e-5, 1e-4, 1e-3, 1e-2)}
    for level, build in LEVELS.items()
}

# Question 5: learning rates and variants at the winners of the paper's grid (one level has momentum, two have none),
# and dampings below that grid with learning rates of their own.
BEST = {"lr": 1e-2, "damping": 1e-3, "kl_clip": 1e-2}
RATES = {
    line: {rate: build(**BEST | {"lr": rate}) for rate in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}
    for line, build in (
        ("one level, μ 0.9", one),
        ("two levels, μ 0", lambda **settings: two(momentum=0.0, **settings)),
        ("two levels, μ 0.9", two),
    )
}
OUTSIDE_THE_GRID = (*product((1e-5, 1e-4), (3e-4, 1e-3, 3e-3, 1e-2)), (1e-3, 1e-3), (1e-2, 1e-3))
BELOW_THE_GRID = {
    level: {(damping, rate): build(damping=damping, lr=rate) for damping, rate in OUTSIDE_THE_GRID}
    for level, build in LEVELS.items()
}
TUNED_VARIANTS = variants(CONTROLS | BASES | TIMES, **BEST)

# Question 6: by net and depth one level and two, and with batch norm one level at a weaker damping too.
SHORT = {"epochs": 40, "seeds": PAPER_SEEDS}
WITH_NORM, WITHOUT_NORM = (8, 16, 32, 64, 128), (2, 4, 8, 16)
DEPTHS = {
    net: {depth: (one(depth=depth, **own, **SHORT), two(depth=depth, **own, **SHORT)) for depth in depths}
    for net, depths, own in (
        ("batch norm, linear", WITH_NORM, {}),
        ("batch norm, ReLU", WITH_NORM, {"activation": "relu"}),
        ("plain, linear", WITHOUT_NORM, {"batch_norm": False}),
        ("plain, ReLU", WITHOUT_NORM, {"batch_norm": False, "activation": "relu"}),
    )
}
WEAK_LAMBDA = 1e-5
WEAKLY_DAMPED = {depth: one(depth=depth, damping=WEAK_LAMBDA, **SHORT) for depth in WITH_NORM}

# Questions 7 and 8: measured while they train, each seed alone.
MICROSCOPE = {"one level": one(), "two levels": two(seeds=5)}
CONVOLUTIONS = Arm(
    "two_level_variant", (("coarse", "observed"), ("epochs", 12)), 5, "resnet20_cifar10_preview"
)

# All that was trained of each level at the paper's depth, by what it is.
TUNED = {
    level: {
        f"{line}, η {rate:g}, λ 0.001": arm
        for line in RATES
        if line.startswith(level)
        for rate, arm in RATES[line].items()
    }
    | {f"{level}, μ 0.9, η {rate:g}, λ {value:g}": arm for (value, rate), arm in own.items()}
    for level, own in BELOW_THE_GRID.items()
}
PARTS = OFF_DIAGONAL | ONES_VECTOR | INITIAL_KICK

# What the pages say first, under both losses: a first arm and the one that it is compared with.
HEADLINES: dict[str, tuple[Arm, Arm]] = {
    "two / one level, the paper's settings": (two(), one()),
    **{
        f"two / one level, λ {value:g}": (two(damping=value), one(damping=value))
        for value in (1e-3, 1e-4, 1e-5)
    },
    "one level at λ 1e-05 / two levels at the paper's": (one(damping=1e-5), two()),
    "full correction / one level, at one level's winner": (TUNED_VARIANTS[FULL], TUNED_VARIANTS[ONE_LEVEL]),
    "two (η 0.003, μ 0) / one level (η 0.003), both at λ 0.001": (
        RATES["two levels, μ 0"][3e-3],
        RATES["one level, μ 0.9"][3e-3],
    ),
    "two (η 0.003, μ 0, λ 0.001) / one level (η 0.003, λ 0.0001)": (
        RATES["two levels, μ 0"][3e-3],
        one(damping=1e-4, lr=3e-3),
    ),
    **{
        f"{name} / {baseline}": (arm, PARTS[baseline])
        for baseline in (ONE_LEVEL, FULL)
        for name, arm in PARTS.items()
        if name not in (ONE_LEVEL, baseline)
    },
}


def _arms(nested: Any) -> Iterator[Arm]:
    if isinstance(nested, Arm):
        yield nested
    else:
        for part in nested.values() if isinstance(nested, Mapping) else nested:
            yield from _arms(part)


QUESTIONS = (
    *(OFF_DIAGONAL, ONES_VECTOR, INITIAL_KICK),
    *(WEIGHTS, LAMBDAS),
    *(RATES, BELOW_THE_GRID, TUNED_VARIANTS),
    *(DEPTHS, WEAKLY_DAMPED),
)
TRAININGS = tuple(dict.fromkeys(_arms(QUESTIONS)))  # an arm of several questions is trained once
