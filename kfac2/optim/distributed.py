"""Several processes that train one model, each on samples of its own, through ``DistributedDataParallel``.

Every process adds up what it has observed, and the sums are added over the processes once per refresh of the
factors, counts included: the curvature is that of all samples, however many of them each process has, and
everything computed from it is the same everywhere.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import Node

Fields = TypeVar("Fields", bound=tuple[Tensor, ...])


class Processes:
    """Those of a ``torch.distributed`` group, None for all there are; without torch.distributed this one alone."""

    def __init__(self, group: Any = None):
        self.group = group

    @property
    def number(self) -> int:
        together = dist.is_available() and dist.is_initialized()
        return max(1, dist.get_world_size(self.group)) if together else 1

    def generators(self, shared: Sequence[torch.Generator]) -> list[torch.Generator]:
        """For one batch's label draws: each process has its own, derived from the ``shared`` ones and its rank.

        The shared ones advance alike everywhere, so that a state which one process has saved resumes on any
        number of them.
        """
        if self.number == 1:
            return list(shared)
        seeds = [int(torch.randint(2**62, (), generator=g, device=g.device)) for g in shared]
        rank = dist.get_rank(self.group)
        return [
            torch.Generator(g.device).manual_seed(seed + rank) for g, seed in zip(shared, seeds, strict=True)
        ]

    def total(self, samples: Sequence[Fields]) -> list[Fields]:
        """Named tuples of tensors of equal shapes in all processes, added field by field."""
        sums = iter(self._sums([field for sample in samples for field in sample]))
        return [type(sample)(*islice(sums, len(sample))) for sample in samples]

    def _sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """In as many messages as there are types; of boolean tensors the sum is their union."""
        device = tensors[0].device  # the masks may live on the CPU, where not every backend sends from
        sums = list(tensors)
        for dtype in dict.fromkeys(map(_sent_as, tensors)):
            index = [i for i, x in enumerate(tensors) if _sent_as(x) == dtype]
            message = torch.cat([tensors[i].flatten().to(device, dtype) for i in index])
            dist.all_reduce(message, group=self.group)
            for i, part in zip(index, message.split([tensors[i].numel() for i in index]), strict=True):
                sums[i] = part.view(tensors[i].shape).to(tensors[i])
        return sums


def _sent_as(x: Tensor) -> torch.dtype:
    return torch.int64 if x.dtype == torch.bool else x.dtype


class Flags(NamedTuple):
    """What processes must agree on besides the samples; true for all where it is for one."""

    missing: Tensor
    """``()``: ``update_curvature`` was not called."""
    plain: Tensor
    """``(L,)``: layers that are left to plain steps."""


@contextmanager
def without_reduction(nodes: Sequence[Node]) -> Iterator[None]:
    """Back-propagate through the nodes that ``DistributedDataParallel`` puts behind its output.

    With ``static_graph`` the first passage has the gradients reduced at its end, and must be the training loss's.
    """
    wrappers = [node.ddp_weakref() for node in nodes]  # pyright: ignore[reportAttributeAccessIssue]
    pending = [
        wrapper
        for wrapper in wrappers
        if not getattr(wrapper, "_static_graph_delay_allreduce_enqueued", True)
    ]
    try:
        for wrapper in pending:
            wrapper._static_graph_delay_allreduce_enqueued = True
        yield
    finally:
        for wrapper in pending:
            wrapper._static_graph_delay_allreduce_enqueued = False
