"""Which layers have curvature in memory, and what of it is saved and loaded."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from kfac2.optim.layers import Layer
from kfac2.optim.memory import layer_bytes, warn_of_little_memory
from kfac2.optim.stacks import LayerStack, blocks_for, make_stacks


class Allocation:
    """The ``stacks`` of those among ``layers`` that have room in memory.

    ``plain`` are the layers left to plain SGD, which grow; ``group_of`` gives each parameter's parameter group.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        plain: Mapping[int, str],
        group_of: Mapping[nn.Parameter, int],
        inverse: str,
    ):
        self.layers, self.inverse = layers, inverse
        self._plain, self._group_of = plain, group_of
        self.stacks: list[LayerStack] = []

    def trainable(self) -> set[int]:
        """Positions of the layers that can be preconditioned now."""
        return {i for i, layer in enumerate(self.layers) if layer.weight.requires_grad} - self._plain.keys()

    def allocated(self) -> set[int]:
        return {i for stack in self.stacks for i in stack.positions}

    def unseen(self) -> list[int]:
        """After the first refresh of the factors, the layers that none has seen though they could be."""
        attempted = {
            i
            for stack in self.stacks
            for i, seen in zip(stack.positions, stack.blocks.attempted.tolist(), strict=True)
            if seen
        }
        return sorted(self.trainable() - attempted) if attempted else []

    def bytes(self) -> int:
        """Of the factors and their inverses, allocated or to be allocated."""
        return sum(layer_bytes(self.layers[i], self.inverse) for i in self.allocated() | self.trainable())

    def grow(self, observed: Iterable[int] = ()) -> bool:
        """Make room for the layers ``observed`` or trainable that have none yet; whether there were any."""
        allocated = self.allocated()
        missing = self.trainable().union(observed) - allocated
        if missing:
            self._make_stacks(allocated | missing, self._states())
        return bool(missing)

    def _make_stacks(self, chosen: Iterable[int], states: Mapping[str, dict[str, Any]]) -> None:
        """Stacks of the ``chosen`` layers, which go on from their ``states``, if they have one."""
        chosen = sorted(chosen)
        new = set(chosen) - self.allocated()
        warn_of_little_memory([self.layers[i] for i in chosen if i in new], self.inverse)
        self.stacks = make_stacks(self.layers, chosen, self._group_of, self.inverse)
        for stack in self.stacks:
            own = [states.get(layer.name, {}) for layer in stack.layers]
            if any(own):
                stack.blocks.load([state or stack.blocks.state(k) for k, state in enumerate(own)])

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """By layer name."""
        states = self._states()
        return {layer.name: states.get(layer.name) or self._nothing(layer) for layer in self.layers}

    def check_state_dict(self, state: Mapping[str, dict[str, Any]]) -> None:
        """Raises ``ValueError`` where the state is of other layers or of another ``inverse``."""
        names, saved = {layer.name for layer in self.layers}, set(state)
        if names != saved:
            differing = ", ".join(sorted(names ^ saved))
            raise ValueError(f"the state was saved with other layers; they differ in: {differing}")
        for layer in self.layers:
            own = state[layer.name]
            if _is_allocated(own):
                blocks_for(layer, 1, "meta", self.inverse).check_state(layer.name, own)
            elif own != self._nothing(layer):
                raise ValueError(
                    f"layer {layer.name!r} was saved with another shape or another `inverse`: "
                    f"{own}, not {self._nothing(layer)}"
                )

    def load_state_dict(self, state: Mapping[str, dict[str, Any]]) -> None:
        """Take over a checked state."""
        states = {name: own for name, own in state.items() if _is_allocated(own)}
        # An older state has room for frozen layers too, which have never been observed.
        at_work = [
            i
            for i, layer in enumerate(self.layers)
            if layer.name in states and (layer.weight.requires_grad or states[layer.name]["attempted"])
        ]
        self._make_stacks(at_work, states)

    def _states(self) -> dict[str, dict[str, Any]]:
        """What is remembered of the layers in ``stacks``, by name."""
        return {
            layer.name: stack.blocks.state(k) for stack in self.stacks for k, layer in enumerate(stack.layers)
        }

    def _nothing(self, layer: Layer) -> dict[str, Any]:
        """The state of a layer that takes no memory yet: enough to refuse another model's."""
        return {"shape": list(layer.matrix_shape), "inverse": self.inverse}


def _is_allocated(state: dict[str, Any]) -> bool:
    return "attempted" in state
