"""What becomes of each parameter, and why: what ``optimizer.coverage`` and ``print(optimizer)`` say."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from kfac2.optim.layers import Layer


class Coverage(NamedTuple):
    """One line of ``optimizer.coverage``."""

    parameter: str
    preconditioned: bool
    reason: str

    def __str__(self) -> str:
        kind = "preconditioned" if self.preconditioned else "plain"
        return f"{self.parameter}: {kind} ({self.reason})"


class Entry(NamedTuple):
    """One of the model's parameters, as the optimizer was built."""

    name: str
    parameter: nn.Parameter
    layer: int | None
    """The position of the layer whose block it is part of; None for a plain parameter."""
    reason: str
    """Why it is plain, or what block it is part of."""

    def line(self, plain: Mapping[int, str], notes: Mapping[int, Sequence[str]] = {}) -> Coverage:
        """``plain``: layers left to plain SGD, with the reason; ``notes``: what is special about others."""
        if self.layer is None:
            return Coverage(self.name, False, self.reason)
        if self.layer in plain:
            return Coverage(self.name, False, plain[self.layer])
        frozen = [] if self.parameter.requires_grad else ["frozen now"]
        return Coverage(self.name, True, ", ".join([self.reason, *frozen, *notes.get(self.layer, [])]))


def summary(entries: Sequence[Entry], layers: Sequence[Layer], plain: Mapping[int, str], memory: int) -> str:
    """The share of parameters that is preconditioned, the memory in MiB, and the layers by shape."""
    sizes = {id(entry.parameter): entry.parameter.numel() for entry in entries}
    covered = {id(entry.parameter) for entry in entries if entry.line(plain).preconditioned}
    share = sum(sizes[key] for key in covered) / sum(sizes.values())
    at_work = [layer for i, layer in enumerate(layers) if i not in plain]
    shapes = Counter((type(layer.module).__name__, layer.matrix_shape) for layer in at_work)
    lines = [
        f"    {number} {kind} with gradients of {rows} x {columns}"
        for (kind, (rows, columns)), number in shapes.most_common()
    ]
    head = (
        f"{len(at_work)} layers with {share:.1%} of {sum(sizes.values()):,} parameters are preconditioned, "
        f"{memory / 2**20:.1f} MiB of curvature"
    )
    return "\n".join([head, *lines])
