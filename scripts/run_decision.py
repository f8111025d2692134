"""Train what is missing of the arms that the verdict is decided by (results/study/rules.md), on all cores.

Further arguments are Hydra's: python scripts/run_decision.py tracking=none
"""

import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from joblib import Parallel, cpu_count, delayed

from experiments.figures.study.decision import finalists
from experiments.figures.study.records import Study
from experiments.figures.study.upper_bound import contestants
from experiments.study.decision import (
    ADAPTIVE,
    CONTROLS,
    CONVOLUTIONAL,
    EXACT,
    GRID,
    PAPERS,
    RECONCILED,
    REPEATED,
    WITHOUT,
    Arm,
)

ROOT = Path(__file__).resolve().parent.parent
RUNS = "runs/decision"


def main(argv: Sequence[str] | None = None) -> None:
    settings = list(sys.argv[1:] if argv is None else argv)
    exact = [arm for grids in EXACT.values() for arms in grids.values() for arm in arms.values()]
    levels = [arm for grid in (GRID, ADAPTIVE, RECONCILED) for arms in grid.values() for arm in arms.values()]
    train([*PAPERS.values(), *REPEATED.values(), *levels, *CONTROLS.values(), *exact], settings)
    study = Study(ROOT / RUNS)
    train([*finalists(study).values(), *(arm for net in EXACT for arm in contestants(study, net))], settings)
    train(CONVOLUTIONAL.values(), settings)
    train(WITHOUT.values(), settings, module="experiments.dependencies")


def train(arms: Iterable[Arm], settings: Sequence[str], module: str = "experiments.train") -> None:
    """Each arm once, as many at a time as there are cores; exits with 1 if one fails, when the others are done."""
    wanted = list(dict.fromkeys(arms))
    statuses = Parallel(n_jobs=cpu_count(), prefer="threads")(
        delayed(_status)(command(arm, settings, module)) for arm in wanted
    )
    failed = [arm.name for arm, status in zip(wanted, statuses, strict=True) if status]
    if failed:
        raise SystemExit(f"failed, the others are done: {'; '.join(failed)}")


def command(arm: Arm, settings: Sequence[str], module: str = "experiments.train") -> list[str]:
    """One arm with all its seeds: its training, or what is measured along it."""
    seeds = ",".join(map(str, arm.own_seeds))
    own = [*arm.overrides, f"seeds=[{seeds}]", f"runs={RUNS}"]
    return [sys.executable, "-m", module, *own, *settings]


def _status(arguments: list[str]) -> int:
    return subprocess.run(arguments, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    main()
