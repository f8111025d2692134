"""Train and measure what is missing of the study, one sweep after another, on all cores.

Does curvature between layers help? The last step needs CIFAR-10. Further arguments are Hydra's:
python scripts/run_study.py tracking=none
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAIN, MEASURE, OBSERVE = "experiments.train", "experiments.microscope", "experiments.coarse_matrix"
BEST = "recipe=deep_linear_mlp/{}_best"


def one_by_one(seeds: int) -> str:
    """Each seed a job of its own."""
    return f"seeds={','.join(f'[{seed}]' for seed in range(seeds))}"


STEPS: list[tuple[str, list[str]]] = [
    (TRAIN, ["sweep=study_one_level", "optimizer=kfac"]),
    (TRAIN, ["sweep=study_variants", "optimizer=two_level_variant"]),
    (TRAIN, ["sweep=study_damping", "optimizer=two_level_variant"]),
    *[(TRAIN, ["sweep=study_lambda", f"optimizer={name}"]) for name in ("kfac", "two_level_kfac")],
    (TRAIN, ["sweep=study_rates", "optimizer=kfac", BEST.format("kfac")]),
    (TRAIN, ["sweep=study_rates", "optimizer=two_level_kfac", BEST.format("two_level_kfac")]),
    (TRAIN, ["sweep=study_rates", "optimizer=two_level_kfac", BEST.format("kfac")]),
    *[
        (TRAIN, [f"sweep={sweep}", f"optimizer={optimizer}"])
        for sweep in ("study_depth", "study_depth_plain")
        for optimizer in ("kfac", "two_level_kfac")
    ],
    (TRAIN, ["sweep=study_depth_lambda", "optimizer=kfac"]),
    (MEASURE, ["optimizer=kfac", one_by_one(10)]),
    *[(TRAIN, ["sweep=study_joint", f"optimizer={name}"]) for name in ("kfac", "two_level_kfac")],
    (
        OBSERVE,
        [
            "problem=resnet20_cifar10_preview",
            "optimizer=two_level_variant",
            "optimizer.coarse=observed",
            "training.epochs=12",
            one_by_one(5),
        ],
    ),
    (TRAIN, ["sweep=study_variants", "optimizer=two_level_variant", BEST.format("kfac")]),
    (MEASURE, ["optimizer=two_level_kfac", one_by_one(5)]),
]


def main(argv: Sequence[str] | None = None) -> None:
    """Run all steps, the later ones too if one fails, and exit with 1 then."""
    settings = list(sys.argv[1:] if argv is None else argv)
    failed = []
    for module, overrides in STEPS:
        arguments = ["-m", *overrides, "hydra/launcher=processes", *settings]
        print(f"python -m {module} {' '.join(arguments)}", flush=True)
        command = [sys.executable, "-m", module, *arguments]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(f"{module} {' '.join(overrides)}")
    if failed:
        raise SystemExit(f"failed, the other steps are done: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
