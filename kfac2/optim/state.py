"""The preconditioner's entry in a state dict, and where ``torch.distributed.checkpoint`` finds it."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch

ENTRY = "preconditioner"
_KIND = attrgetter("dtype", "device")
Groups = Sequence[dict[str, Any]]


def placement(param_groups: Groups) -> list[tuple[torch.dtype, torch.device]]:
    """Type and device of every parameter."""
    return [kind for group in param_groups for kind in map(_KIND, group["params"])]


def with_carrier(state_dict: dict[str, Any], param_groups: Groups) -> dict[str, Any]:
    """The state dict with its entry in the state of the first trainable parameter too, without a copy.

    ``torch.distributed.checkpoint`` drops all top-level entries but ``state`` and ``param_groups``, and in
    ``state`` the frozen parameters'.
    """
    params = [p for group in param_groups for p in group["params"]]
    carrier = next((i for i, p in enumerate(params) if p.requires_grad), 0)
    states = state_dict.get("state", {})
    if ENTRY not in state_dict or carrier not in states:
        return state_dict
    return {**state_dict, "state": states | {carrier: {**states[carrier], ENTRY: state_dict[ENTRY]}}}


def without_entry(state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entry, and the state dict without it: under ``state`` torch would cast it to the parameter's type.

    Raises:
        ValueError: it has none.
    """
    states = state_dict["state"].values()
    found = [state_dict[ENTRY]] if ENTRY in state_dict else [own[ENTRY] for own in states if ENTRY in own]
    if not found:
        raise ValueError(f"the state dict has no {ENTRY!r} entry: it is not a K-FAC optimizer's")
    rest = {key: value for key, value in state_dict.items() if key != ENTRY}
    rest["state"] = {
        key: {name: value for name, value in own.items() if name != ENTRY}
        for key, own in state_dict["state"].items()
    }
    return found[0], rest
