"""An optimizer of its own for the parameters that are not preconditioned, inside the K-FAC optimizer."""

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from kfac2.optim.coverage import Entry

Rest = str | Callable[[list[nn.Parameter]], Optimizer]


def split_rest(
    rest: Rest, param_groups: Sequence[dict[str, Any]], preconditioned: Collection[nn.Parameter]
) -> Optimizer | None:
    """Build ``rest`` for all other parameters and take these out of their groups; None for ``"sgd"``.

    Raises:
        TypeError, ValueError: ``rest`` makes no optimizer, or not one of just these parameters.
    """
    if rest == "sgd":
        return None
    if not callable(rest):
        raise ValueError(
            f"rest must be 'sgd' or make an optimizer from parameters, got {rest!r}: "
            "rest=partial(torch.optim.AdamW, lr=1e-3)"
        )
    others = [p for group in param_groups for p in group["params"] if p not in preconditioned]
    if not others:
        return None
    optimizer = rest(others)
    _check(optimizer, others)
    for group in param_groups:
        kept = [k for k, p in enumerate(group["params"]) if p in preconditioned]
        for key in {"params", "param_names"} & group.keys():
            group[key] = [group[key][k] for k in kept]
    return optimizer


def name_of(rest: Optimizer | None) -> str | None:
    return None if rest is None else type(rest).__name__


def with_rest(entries: Sequence[Entry], rest: Optimizer | None) -> list[Entry]:
    """The entries, those of the rest's parameters naming it."""
    own = set() if rest is None else {p for group in rest.param_groups for p in group["params"]}
    return [
        entry._replace(reason=f"{entry.reason}: {name_of(rest)}") if entry.parameter in own else entry
        for entry in entries
    ]


def check_same_rest(saved: str | None, rest: Optimizer | None) -> None:
    """Raises ``ValueError`` where a state was saved with another ``rest``."""
    if saved != name_of(rest):
        raise ValueError(f"the state was saved with rest={saved or 'sgd'}, not {name_of(rest) or 'sgd'}")


def _check(optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"rest made a {type(optimizer).__name__} of the parameters, not a torch optimizer")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"rest makes a {name_of(optimizer)}, whose step needs a closure: take another")
    taken = {p for group in optimizer.param_groups for p in group["params"]}
    if taken != set(parameters):
        raise ValueError(
            f"rest was given {len(parameters)} parameters and made a {name_of(optimizer)} of {len(taken)}, "
            "not all of them the same: the others would not be trained"
        )
