"""What lies behind an output in the graph of autograd: calls of layers, and every use of their weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node


@dataclass(eq=False, slots=True, weakref_slot=True)
class Call:
    """One call of a layer. It lies on its output's node, so it lives as long as the graph does."""

    layer: int
    inputs: Tensor | None
    """Without their own history, which may lead back to the node; None once they have been released."""
    version: int
    """Of the inputs, which must not be overwritten before they are read."""
    shape: torch.Size
    """Of the output, and of its gradient."""
    output_nr: int
    nodes: range
    """Sequence numbers of the nodes that the layer itself has made."""


@dataclass
class Behind:
    """What an output depends on."""

    calls: dict[Node, Call] = field(default_factory=dict)
    deepest: list[Node] = field(default_factory=list)
    """Those nodes of calls that have no other call below."""
    uses: list[tuple[int, Node]] = field(default_factory=list)
    """A layer, and a node that combines its weight (transposed, cast, …) with something else."""
    checkpoints: int = 0
    """Number of nodes of reentrant activation checkpointing, which hide what they have run."""
    checkpoint_above_call: bool = False
    data_parallel: list[Node] = field(default_factory=list)
    """Nodes that ``DistributedDataParallel`` has put behind its output."""

    def used_elsewhere(self) -> set[int]:
        """The layers whose weight is used by anything but a call."""
        own: dict[int, list[range]] = {}
        for call in self.calls.values():
            own.setdefault(call.layer, []).append(call.nodes)
        return {
            layer
            for layer, node in self.uses
            if not any(node._sequence_nr() in nodes for nodes in own.get(layer, ()))  # pyright: ignore
        }


def look_behind(root: Node | None, key: object, weights: Mapping[nn.Parameter, int]) -> Behind:
    """Walk down from ``root``; calls lie under ``key`` in the nodes' metadata, ``weights`` give the layers."""
    behind = Behind()
    leads: dict[Node, bool] = {}  # whether a call lies at the node or below
    carries: dict[Node, int] = {}  # the weight that nodes with a single input hand up
    stack: list[tuple[Node, list[Node | None] | None]] = [] if root is None else [(root, None)]
    while stack:
        node, children = stack.pop()
        if children is not None:
            _classify(node, children, key, behind, leads, carries)
        elif node not in leads:
            leads[node] = False
            children = [child for child, _ in node.next_functions]
            if children:
                stack.append((node, children))  # again, after its children
                stack += [(child, None) for child in children if child is not None]
            elif (layer := weights.get(getattr(node, "variable", None))) is not None:  # pyright: ignore
                carries[node] = layer
    return behind


def _classify(
    node: Node,
    children: list[Node | None],
    key: object,
    behind: Behind,
    leads: dict[Node, bool],
    carries: dict[Node, int],
) -> None:
    """Note what a node is, its children being known."""
    below = any(leads[child] for child in children if child is not None)
    call: Call | None = node.metadata.get(key)  # pyright: ignore[reportAttributeAccessIssue]
    if call is not None:
        behind.calls[node] = call
        if not below:
            behind.deepest.append(node)
    leads[node] = below or call is not None
    carried = [carries[child] for child in children if child in carries]
    if carried and len(children) == 1 and call is None:
        carries[node] = carried[0]
    else:
        behind.uses += [(layer, node) for layer in carried]
    if type(node).__name__ == "_DDPSinkBackward":
        behind.data_parallel.append(node)
    elif type(node).__name__ == "CheckpointFunctionBackward":
        behind.checkpoints += 1
        behind.checkpoint_above_call |= below
