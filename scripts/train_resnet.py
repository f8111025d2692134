"""Train what is missing of the ResNet on CIFAR10 at one scale; a run that was killed goes on.

On a GPU one training after another, else one per core. Further arguments are Hydra's:
python scripts/train_resnet.py --scale=reduced optimizer=sgd,adam training.batch_size=128
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.figures.scales import SCALES

ROOT = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument("--seeds", help="such as 3,4 (default: the scale's)")
    arguments, settings = parser.parse_known_args(argv)
    scale = SCALES[arguments.scale]
    seeds = (arguments.seeds or ",".join(map(str, range(scale.seeds)))).split(",")
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
        *settings,
    ]
    raise SystemExit(subprocess.run(command, cwd=ROOT, check=False).returncode)


def overrides(problem: str, seeds: Sequence[str], machine: str) -> list[str]:
    """Hydra's arguments for one training per seed; all optimizers of a seed come before the next seed."""
    where = "device=cuda" if machine == "GPU" else "hydra/launcher=processes"
    return ["-m", f"problem={problem}", f"seeds={','.join(f'[{seed}]' for seed in seeds)}", where]


if __name__ == "__main__":
    main()
