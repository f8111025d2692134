"""Train what is missing of the ResNet on CIFAR10 at one scale; a run that was killed goes on.

On a GPU one training after another, else one per core. Further arguments are Hydra's:
python scripts/train_resnet.py --scale=reduced optimizer=sgd,adam training.batch_size=128
python scripts/train_resnet.py --scale=full --list
"""

import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments.figures.scales import SCALES
from experiments.paper import OPTIMIZERS
from experiments.records import NoRecordsError, load_record, seed_directory
from experiments.select import planned

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = Path("results")


class Planned(NamedTuple):
    """One training: its record's directory, its optimizer, its epochs, how many are done and their seconds."""

    path: Path
    optimizer: str
    epochs: int
    done: int = 0
    seconds: float = 0.0
    machine: str = ""


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument("--seeds", help="such as 3,4 (default: the scale's)")
    parser.add_argument(
        "--hours", type=float, help="stop with the last epoch that fits; the same command goes on"
    )
    parser.add_argument("--list", action="store_true", help="say what is trained and how long the rest takes")
    arguments, settings = parser.parse_known_args(argv)
    scale = SCALES[arguments.scale]
    seeds = arguments.seeds.split(",") if arguments.seeds else seeds_of(scale.problem)
    if arguments.list:
        print(listing(trainings(scale.problem, seeds, settings)))
        return
    machine = "GPU" if torch.cuda.is_available() else "CPU"
    print(
        f"training what is missing of {scale.title} at {arguments.scale} scale on the {machine}: "
        f"seeds {','.join(seeds)}, {' '.join(settings)}",
        flush=True,
    )
    command = [
        sys.executable,
        "-m",
        "experiments.train",
        *overrides(scale.problem, seeds, machine),
        *([f"hours={arguments.hours}"] if arguments.hours is not None else []),
        *settings,
    ]
    raise SystemExit(subprocess.run(command, cwd=ROOT, check=False).returncode)


def seeds_of(problem: str) -> list[str]:
    """Those of its file in configs/experiment/."""
    (config,) = planned([f"problem={problem}", f"optimizer={OPTIMIZERS[0]}"]).configs
    return [str(seed) for seed in config.seeds]


def overrides(problem: str, seeds: Sequence[str], machine: str) -> list[str]:
    """Hydra's arguments for one training per seed; all optimizers of a seed come before the next seed."""
    where = "device=cuda" if machine == "GPU" else "hydra/launcher=processes"
    return ["-m", f"problem={problem}", f"seeds={','.join(f'[{seed}]' for seed in seeds)}", where]


def trainings(problem: str, seeds: Sequence[str], settings: Sequence[str]) -> list[Planned]:
    """Those of all optimizers, or of those in ``settings``, each as far as it is here, else in results/."""
    grid = planned([f"problem={problem}", f"seeds=[{','.join(seeds)}]", *settings])
    return [
        _as_far(config, point.optimizer, seed_directory(Path(problem, point.optimizer, point.variant), seed))
        for point, config in zip(grid.points, grid.configs, strict=True)
        for seed in point.seeds
    ]


def _as_far(config: Any, optimizer: str, path: Path) -> Planned:
    """What the record says of itself."""
    here, epochs = Path(config.runs, path), config.training.epochs
    for place in (here, COMMITTED / path):
        with suppress(NoRecordsError):
            record = load_record(ROOT / place)
            last = record.curves.iloc[-1]
            return Planned(place, optimizer, epochs, int(last["epoch"]), last["seconds"], record.machine)
    return Planned(here, optimizer, epochs)


def listing(plan: Sequence[Planned]) -> str:
    """A line for each training, and how long what is missing will train, from the seconds of what is there."""
    lines = [
        f"{t.path}: {'complete' if t.done == t.epochs else f'{t.done} of {t.epochs} epochs'}" for t in plan
    ]
    complete = sum(t.done == t.epochs for t in plan)
    return "\n".join([*lines, f"{complete} of {len(plan)} trainings complete; {remaining(plan)}"])


def remaining(plan: Sequence[Planned]) -> str:
    """An optimizer of which no epoch is trained yet is taken to be as slow as the slowest of the others."""
    if all(t.done == t.epochs for t in plan):
        return "nothing is missing"
    begun = [t for t in plan if t.done]
    if not begun:
        return "how long the rest takes is known once an epoch is trained"
    per_epoch = {
        name: max(t.seconds / t.done for t in begun if t.optimizer == name)
        for name in {t.optimizer for t in begun}
    }
    slowest = max(per_epoch.values())
    seconds = sum((t.epochs - t.done) * per_epoch.get(t.optimizer, slowest) for t in plan)
    machines = " / ".join(sorted({t.machine for t in begun}))
    return f"the rest takes about {seconds / 3600:.1f} hours of training, one after another, as on {machines}"


if __name__ == "__main__":
    main()
