"""Train what is missing of a figure, the grid or the study, into runs/, and draw it there; what was killed goes on.

python scripts/reproduce.py figure1 --scale=preview tracking=none
python scripts/reproduce.py figures --committed

Further arguments are Hydra's. A ResNet without CIFAR-10 is not trained, and drawn from the records there are.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.figures.scales import SCALES
from experiments.paper import OPTIMIZERS

ROOT = Path(__file__).resolve().parent.parent
ABSENT = 3  # the exit status of get_cifar10.py where there is none
ALL = f"optimizer={','.join(reversed(OPTIMIZERS))}"  # the slowest first


@dataclass
class Options:
    """``scale`` and ``seeds`` of the ResNet, empty for the default; ``committed``: draw and train nothing."""

    scale: str = ""
    seeds: str = ""
    committed: bool = False
    settings: Sequence[str] = ()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument(
        "--scale", choices=SCALES, help="of the ResNet (default: full where torch finds a GPU, else preview)"
    )
    parser.add_argument("--seeds", help="of the ResNet, such as 3,4 (default: the scale's)")
    parser.add_argument("--committed", action="store_true", help="draw from results/ into results/ instead")
    arguments, settings = parser.parse_known_args(argv)
    if unknown := [each for each in settings if each.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}")
    options = Options(arguments.scale or "", arguments.seeds or "", arguments.committed, settings)
    if not options.committed:
        options.scale = options.scale or default_scale()
    TARGETS[arguments.target](options)


def default_scale() -> str:
    import torch  # seconds, which drawing alone does not need

    return "full" if torch.cuda.is_available() else "preview"


def train_mlp(options: Options) -> None:
    if not options.committed:
        settings = ["problem=deep_linear_mlp", ALL, "hydra/launcher=processes", *options.settings]
        must("-m", "experiments.train", "-m", *settings)


def train_resnet(options: Options, *settings: str) -> None:
    must("scripts/get_cifar10.py")
    seeds = [f"--seeds={options.seeds}"] if options.seeds else []
    script = ["scripts/train_resnet.py", f"--scale={options.scale}", *seeds]
    must(*script, *(settings or [ALL]), *options.settings)


def train_resnet_where_possible(options: Options) -> None:
    if options.committed:
        return
    try:
        train_resnet(options)
    except Failed as failed:
        if (failed.command, failed.code) != ("scripts/get_cifar10.py", ABSENT):
            raise
        print(
            "no CIFAR-10: the ResNet is not trained, and drawn from the records there are (runs/, else results/)"
        )


def train_control(options: Options) -> None:
    """SGD and Adam at K-FAC's batch size."""
    train_resnet(options, "optimizer=sgd,adam", "training.batch_size=128")


def figure1(options: Options) -> None:
    train_mlp(options)
    train_resnet_where_possible(options)
    draw("figure1", options, *of_resnet(options))


def figure2(options: Options) -> None:
    train_mlp(options)
    draw("figure2", options)


def figure3(options: Options) -> None:
    train_resnet_where_possible(options)
    draw("figure3", options, *of_resnet(options))


def sweep(options: Options) -> None:
    """The paper's grid of the MLP: table, winners' recipes and figures."""
    failed = 0
    for name in () if options.committed else reversed(OPTIMIZERS):
        settings = [f"optimizer={name}", "hydra/launcher=processes", *options.settings]
        failed |= run(
            "-m", "experiments.train", "-m", "problem=deep_linear_mlp", "sweep=paper_grid", *settings
        )
    must("-m", "experiments.select", "sweep=paper_grid", f"runs={root(options)}")
    draw("sweep", options)
    if failed:
        raise SystemExit(1)


def study(options: Options) -> None:
    failed = 0
    for script in () if options.committed else ("scripts/run_study.py", "scripts/run_decision.py"):
        failed |= run(script, *options.settings)
    records = "results/study" if options.committed else "runs"
    must("scripts/plot_study.py", "--records", records, "--output", f"{root(options)}/study")
    if failed:
        raise SystemExit(1)


def figures(options: Options) -> None:
    for each in (figure1, figure2, figure3, sweep, study):
        each(options)


TARGETS: dict[str, Callable[[Options], None]] = {
    "figure1": figure1,
    "figure2": figure2,
    "figure3": figure3,
    "sweep": sweep,
    "study": study,
    "figures": figures,
    "mlp": train_mlp,
    "resnet": train_resnet,
    "resnet-control": train_control,
}


def draw(name: str, options: Options, *arguments: str) -> None:
    places = ["--records", root(options), "--output", f"{root(options)}/figures"]
    must(f"scripts/plot_{name}.py", *places, *arguments)


def of_resnet(options: Options) -> list[str]:
    return ["--reference", "results", *([f"--scale={options.scale}"] if options.scale else [])]


def root(options: Options) -> str:
    return "results" if options.committed else "runs"


class Failed(SystemExit):
    """A command's exit status, which ends this one too."""

    def __init__(self, command: str, status: int):
        super().__init__(status)
        self.command = command


def must(*command: str) -> None:
    if status := run(*command):
        raise Failed(command[0], status)


def run(*command: str) -> int:
    """The exit status of a Python command in the checkout."""
    return subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    main()
