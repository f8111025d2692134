"""Which layers of a model are preconditioned, and why the other parameters are not."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from kfac2.optim.coverage import Entry
from kfac2.optim.hooks import has_own_forward
from kfac2.optim.layers import ADAPTERS, Layer, adapter_of, why_without_adapter

Exclude = Iterable[str] | Callable[[str, nn.Module], bool]
SHARDED = {"DataParallel", "FullyShardedDataParallel", "FSDPModule"}


def refuse_wrapped(model: nn.Module) -> None:
    """Raise ``ValueError`` for wrappers of data parallelism, where captures would be wrong."""
    for module in model.modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if "DistributedDataParallel" in kinds:
            raise ValueError(
                "give K-FAC the plain module, not the DistributedDataParallel around it: "
                "optimizer = KFAC(ddp.module, ...), and go on calling ddp(x)"
            )
        if kinds & SHARDED or hasattr(module, "_fsdp_wrapped_module"):
            raise ValueError(
                f"{', '.join(sorted(kinds & SHARDED)) or 'FullyShardedDataParallel'} is not supported: no process "
                "has whole layers. For several processes build the optimizer from the plain module and call that "
                "through DistributedDataParallel"
            )


def canonical_name(name: str) -> str:
    """A module's name without the prefixes that wrappers add."""
    return ".".join(part for part in name.removeprefix("module.").split(".") if part != "_orig_mod")


def select_layers(
    model: nn.Module, optimized: set[nn.Parameter], exclude: Exclude
) -> tuple[list[Layer], list[Entry]]:
    """The layers to precondition, in the model's order, and an entry for each of the model's parameters.

    Raises:
        ValueError: an excluded name that the model does not have, no supported layer at all, or
            layers with different numbers of replicas.
    """
    excluded = _exclusion(model, exclude)
    shared = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    layers: list[Layer] = []
    entries: list[Entry] = []
    revealed: set[nn.Module] = set()
    for full_name, module in model.named_modules():
        name, adapter = canonical_name(full_name), adapter_of(module)
        reason = _reason_for_plain(name, module, adapter, optimized, excluded, shared, module in revealed)
        layer = None
        if adapter is not None and reason is None:
            bias: nn.Parameter | None = getattr(module, adapter.bias_name, None)
            with_bias = bias is not None and bias.requires_grad and bias in optimized
            layer = adapter(name, module, with_bias)
            layers.append(layer)
            revealed.update(layer.revealed)
        for key, parameter in module.named_parameters(recurse=False):
            inside = layer is not None and any(parameter is p for p in layer.parameters)
            why = _describe(parameter, optimized, reason, inside, type(module).__name__)
            position = len(layers) - 1 if inside else None
            entries.append(Entry(f"{name}.{key}".lstrip("."), parameter, position, why))
    _check(layers, entries)
    return layers, entries


def _reason_for_plain(
    name: str,
    module: nn.Module,
    adapter: type[Layer] | None,
    optimized: set[nn.Parameter],
    excluded: Callable[[str, nn.Module], bool],
    shared: Counter[int],
    revealed: bool,
) -> str | None:
    if adapter is None:
        return why_without_adapter(module)
    if excluded(name, module):
        return "excluded"
    if not revealed and (reason := adapter.unsupported(module)) is not None:
        return reason
    weight: nn.Parameter = getattr(module, adapter.weight_name)
    if is_parametrized(module):
        return "its weight or bias is made from others (torch.nn.utils.parametrize)"
    if is_lazy(weight):
        return "its weight has no values yet: run a forward pass before the optimizer is built"
    if weight not in optimized:
        return "the layer's weight is not optimized"
    if any(shared[id(p)] > 1 for p in module.parameters(recurse=False)):
        return "shared with another module"
    if weight.is_complex():
        return "complex weights have no Kronecker block here"
    if not has_own_forward(module):
        return f"its forward is not that of {type(module).__name__}"
    return None


def _describe(
    parameter: nn.Parameter, optimized: set[nn.Parameter], reason: str | None, inside: bool, kind: str
) -> str:
    if parameter not in optimized:
        return "not given to the optimizer"
    if inside:
        return f"Kronecker-factored block of a {kind}"
    return reason or "was frozen when the optimizer was built"


def _exclusion(model: nn.Module, exclude: Exclude) -> Callable[[str, nn.Module], bool]:
    if callable(exclude):
        return exclude
    names = [exclude] if isinstance(exclude, str) else list(exclude)
    known = {canonical_name(name): module for name, module in model.named_modules()}
    unknown = [name for name in names if name not in known]
    if unknown:
        layers = [name for name, module in known.items() if adapter_of(module) is not None]
        raise ValueError(f"exclude names {unknown}, but the model's layers are: {', '.join(layers)}")
    return lambda name, module: any(name == e or name.startswith(f"{e}.") for e in names)


def _check(layers: Sequence[Layer], entries: Sequence[Entry]) -> None:
    if not layers:
        supported = ", ".join(kind if isinstance(kind, str) else kind.__name__ for kind in ADAPTERS)
        lines = "\n".join(f"  {entry.line({})}" for entry in entries)
        raise ValueError(f"no layer to precondition: supported are {supported}. Found:\n{lines}")
    kinds = {(layer.replicated, layer.replicas) for layer in layers}
    if len(kinds) > 1:
        raise ValueError(
            "all layers must have one number of replicas, got "
            f"{sorted({layer.replicas for layer in layers})}, or mix plain and replicated layers"
        )
