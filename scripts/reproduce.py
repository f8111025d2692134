"""Train what is missing of a figure, the grid or the study, into runs/, and draw it there; what was killed goes on.

python scripts/reproduce.py figure1 --scale=preview tracking=none
python scripts/reproduce.py figures --committed

Further arguments are Hydra's. A ResNet without CIFAR-10 is not trained, and drawn from the records there are.
"""

import subprocess
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.figures.scales import SCALES
from experiments.paper import OPTIMIZERS

ROOT = Path(__file__).resolve().parent.parent
ABSENT = 3  # the exit status of get_cifar10.py where there is none
ALL = f"optimizer={','.join(reversed(OPTIMIZERS))}"  # the slowest first


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument(
        "--scale", choices=SCALES, help="of the ResNet (default: full where torch finds a GPU, else preview)"
    )
    parser.add_argument("--seeds", help="of the ResNet, such as 3,4 (default: the scale's)")
    parser.add_argument("--committed", action="store_true", help="draw from results/ into results/ instead")
    options, options.settings = parser.parse_known_args(argv)
    if unknown := [each for each in options.settings if each.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}")
    if not options.committed:
        options.scale = options.scale or default_scale()
    TARGETS[options.target](options)


def default_scale() -> str:
    import torch  # seconds, which drawing alone does not need

    return "full" if torch.cuda.is_available() else "preview"


def train_mlp(options: Namespace) -> None:
    if not options.committed:
        settings = ["problem=deep_linear_mlp", ALL, "hydra/launcher=processes", *options.settings]
        must("-m", "experiments.train", "-m", *settings)


def train_resnet(options: Namespace) -> None:
    must("scripts/get_cifar10.py")
    train_scale(options, ALL)


def train_control(options: Namespace) -> None:
    """SGD and Adam at K-FAC's batch size."""
    must("scripts/get_cifar10.py")
    train_scale(options, "optimizer=sgd,adam", "training.batch_size=128")


def train_resnet_where_possible(options: Namespace) -> None:
    if options.committed:
        return
    status = run("scripts/get_cifar10.py")
    if status == ABSENT:
        print(
            "no CIFAR-10: the ResNet is not trained, and drawn from the records there are (runs/, else results/)"
        )
    elif status:
        raise SystemExit(status)
    else:
        train_scale(options, ALL)


def train_scale(options: Namespace, *settings: str) -> None:
    seeds = [f"--seeds={options.seeds}"] if options.seeds else []
    must("scripts/train_resnet.py", f"--scale={options.scale}", *seeds, *settings, *options.settings)


def figure1(options: Namespace) -> None:
    train_mlp(options)
    train_resnet_where_possible(options)
    draw("figure1", options, *of_resnet(options))


def figure2(options: Namespace) -> None:
    train_mlp(options)
    draw("figure2", options)


def figure3(options: Namespace) -> None:
    train_resnet_where_possible(options)
    draw("figure3", options, *of_resnet(options))


def sweep(options: Namespace) -> None:
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


def study(options: Namespace) -> None:
    failed = 0
    for script in () if options.committed else ("scripts/run_study.py", "scripts/run_decision.py"):
        failed |= run(script, *options.settings)
    records = "results/study" if options.committed else "runs"
    must("scripts/plot_study.py", "--records", records, "--output", f"{root(options)}/study")
    if failed:
        raise SystemExit(1)


def figures(options: Namespace) -> None:
    for each in (figure1, figure2, figure3, sweep, study):
        each(options)


TARGETS: dict[str, Callable[[Namespace], None]] = {
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


def draw(name: str, options: Namespace, *arguments: str) -> None:
    places = ["--records", root(options), "--output", f"{root(options)}/figures"]
    must(f"scripts/plot_{name}.py", *places, *arguments)


def of_resnet(options: Namespace) -> list[str]:
    return ["--reference", "results", *([f"--scale={options.scale}"] if options.scale else [])]


def root(options: Namespace) -> str:
    return "results" if options.committed else "runs"


def must(*command: str) -> None:
    if status := run(*command):
        raise SystemExit(status)


def run(*command: str) -> int:
    """The exit status of a Python command in the checkout."""
    return subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    main()
