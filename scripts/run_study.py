"""Train and measure what is missing of the study (experiments/study/arms.py), on all cores.

Does curvature between layers help? The last step needs CIFAR-10. Further arguments are Hydra's:
python scripts/run_study.py tracking=none
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

from experiments.study.arms import CONVOLUTIONS, MICROSCOPE, TRAININGS, Arm

ROOT = Path(__file__).resolve().parent.parent


def one_by_one(arm: Arm) -> list[str]:
    """A measured arm as Hydra's arguments, each seed a job of its own."""
    seeds = ",".join(f"[{seed}]" for seed in range(arm.seeds))
    return [*arm.overrides, f"seeds={seeds}"]


STEPS = [
    ("experiments.train", [f"arm={','.join(arm.name for arm in TRAININGS)}"]),
    *[("experiments.microscope", one_by_one(arm)) for arm in MICROSCOPE.values()],
    ("experiments.coarse_matrix", one_by_one(CONVOLUTIONS)),
]


def main(argv: Sequence[str] | None = None) -> None:
    """Run all steps, the later ones too if one fails, and exit with 1 then."""
    settings = list(sys.argv[1:] if argv is None else argv)
    failed = []
    for module, overrides in STEPS:
        arguments = ["-m", *overrides, "hydra/launcher=processes", *settings]
        print(shorten(f"python -m {module} {' '.join(arguments)}", 200, placeholder=" ..."), flush=True)
        command = [sys.executable, "-m", module, *arguments]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(module)
    if failed:
        raise SystemExit(f"failed, the other steps are done: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
