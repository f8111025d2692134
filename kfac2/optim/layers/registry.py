"""Which adapter a module gets."""

from typing import Any

from torch import nn

from kfac2.nn import ReplicatedLinear
from kfac2.optim.layers.attention import InProjectionLayer
from kfac2.optim.layers.base import Layer
from kfac2.optim.layers.convolution import ConvolutionLayer, TransposedConvolutionLayer
from kfac2.optim.layers.embedding import EmbeddingLayer
from kfac2.optim.layers.linear import LinearLayer, ReplicatedLinearLayer, TransposedLinearLayer

Kind = type[nn.Module] | str

ADAPTERS: dict[Kind, type[Layer]] = {
    nn.Linear: LinearLayer,
    nn.Conv1d: ConvolutionLayer,
    nn.Conv2d: ConvolutionLayer,
    nn.Conv3d: ConvolutionLayer,
    nn.ConvTranspose1d: TransposedConvolutionLayer,
    nn.ConvTranspose2d: TransposedConvolutionLayer,
    nn.ConvTranspose3d: TransposedConvolutionLayer,
    nn.Embedding: EmbeddingLayer,
    nn.MultiheadAttention: InProjectionLayer,
    ReplicatedLinear: ReplicatedLinearLayer,
    "transformers.pytorch_utils.Conv1D": TransposedLinearLayer,
}
"""By a module's type, or by the dotted name of one that is not to be imported."""


def register_layer(kind: Kind, adapter: type[Layer]) -> None:
    """Have optimizers that are built from now on precondition modules of type ``kind``.

    That includes subclasses with the same forward. An earlier adapter of that type is replaced.

    An adapter is a subclass of ``kfac2.optim.layers.Layer`` or of one of the adapters beside it. It says how
    the weight becomes a matrix and back, and what the statistics of a call are. For a linear layer that keeps
    its weight as ``(in, out)``::

        class Projection(nn.Module):
            def __init__(self, d_in, d_out):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(d_in, d_out) / d_in**0.5)
                self.bias = nn.Parameter(torch.zeros(d_out))

            def forward(self, input):
                return input @ self.weight + self.bias

        class ProjectionLayer(LinearLayer):             # kfac2.optim.layers.LinearLayer
            def weight_matrix(self, weights):           # (n, in, out) → (n, 1, out, in)
                return weights.mT[:, None]

            def weight_like(self, matrices):            # and back
                return matrices[:, 0].mT

        kfac2.register_layer(Projection, ProjectionLayer)

    The scale and shift of norms take the plain update unless they are registered too, with ``LayerNormLayer``,
    ``GroupNormLayer`` or ``BatchNormLayer`` (also there)::

        kfac2.register_layer(nn.LayerNorm, LayerNormLayer)

    Args:
        kind: the module's type, or its dotted name (``"package.module.Type"``) if it is not imported yet. Its
            modules have a parameter ``weight``, and may have another, ``bias``; the adapter may give other names.
        adapter: built with a module's name, the module and whether its bias is trained.

    Raises:
        TypeError: an argument of another kind.
    """
    if not (isinstance(kind, str) or _is_subclass(kind, nn.Module)):
        raise TypeError(f"register_layer needs a subclass of nn.Module or its dotted name, got {kind!r}")
    if not _is_subclass(adapter, Layer):
        raise TypeError(f"an adapter is a subclass of kfac2.optim.layers.Layer, got {adapter!r}")
    ADAPTERS[kind] = adapter


def adapter_of(module: nn.Module) -> type[Layer] | None:
    """That of the module's type, or of the type it inherits all its computation from; None if it has none."""
    base = _registered_base(module)
    if base is None:
        return None
    adapter = _adapter(base)
    assert adapter is not None
    inherited = (
        getattr(type(module), name, None) is getattr(base, name, None) for name in adapter.computed_by
    )
    return adapter if all(inherited) else None


def why_without_adapter(module: nn.Module) -> str:
    base = _registered_base(module)
    if base is None:
        return f"{type(module).__name__} is not a supported layer"
    return (
        f"{type(module).__name__} is a {base.__name__} with a forward of its own: kfac2.register_layer gives it "
        "an adapter"
    )


def _registered_base(module: nn.Module) -> type[nn.Module] | None:
    return next((base for base in type(module).__mro__ if _adapter(base) is not None), None)


def _adapter(kind: type) -> type[Layer] | None:
    return ADAPTERS.get(kind) or ADAPTERS.get(f"{kind.__module__}.{kind.__qualname__}")


def _is_subclass(kind: Any, of: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, of)
