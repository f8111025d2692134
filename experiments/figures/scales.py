"""The paper's two experiments, of which the ResNet's comes at four scales; which one there is to draw."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from experiments.figures.curves import Runs
from experiments.paper import OPTIMIZERS
from experiments.records import NoRecordsError


class Scale(NamedTuple):
    """An experiment at one scale: its problem's name and its title."""

    problem: str
    title: str


MLP = Scale("deep_linear_mlp", "64-layer linear MLP")
SCALES = {  # preferred first
    "full": Scale("resnet110_cifar10", "ResNet110 / CIFAR10"),
    "short": Scale("resnet110_cifar10_short", "ResNet110 / CIFAR10"),
    "reduced": Scale("resnet110_cifar10_reduced", "ResNet110 / CIFAR10"),
    "preview": Scale("resnet20_cifar10_preview", "ResNet20 / CIFAR10"),
}
Read = Callable[[Path, str], Runs]


class Found(NamedTuple):
    """The ResNet's ``runs`` by optimizer: the directory ``root`` that they were found in, and their scale."""

    root: Path
    scale: Scale
    runs: Runs


def find_resnet(read: Read, records: Path, reference: Path, scale: str | None = None) -> Found:
    """The records of the ResNet to draw.

    Args:
        read: ``read(root, problem)`` returns runs or raises ``NoRecordsError``.
        records: the directory to look in first.
        reference: the directory to look in where ``records`` has none.
        scale: the wanted one of ``SCALES``. Where neither directory has it, and for None: the first
            scale with all of the paper's optimizers, else the first that there is.

    Raises:
        NoRecordsError: no directory has any; of the wanted scale, or the last.
    """
    for root, name, needs_all in _places(records, reference, scale):
        try:
            runs = read(root, SCALES[name].problem)
        except NoRecordsError:
            continue
        if not needs_all or set(OPTIMIZERS) <= set(runs):
            return Found(root, SCALES[name], runs)
    wanted = SCALES[scale or "preview"]
    return Found(records, wanted, read(records, wanted.problem))  # raises, and says how to make them


def _places(records: Path, reference: Path, scale: str | None) -> Iterator[tuple[Path, str, bool]]:
    """Directory, scale and whether all optimizers must be there, best first."""
    roots: Sequence[Path] = (records, reference)
    if scale:
        yield from ((root, scale, False) for root in roots)
        roots = (reference, records)
    yield from ((root, name, needs_all) for needs_all, root, name in product((True, False), roots, SCALES))
