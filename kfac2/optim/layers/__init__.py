"""One adapter per layer type: how a module's tensors become K-FAC statistics and gradient matrices.

To support another type, write one class and ``register_layer`` it: that function's documentation has an example.
"""

from kfac2.optim.layers.attention import InProjectionLayer
from kfac2.optim.layers.base import Basis, Layer, Moments, Totals
from kfac2.optim.layers.convolution import ConvolutionLayer, TransposedConvolutionLayer
from kfac2.optim.layers.embedding import EmbeddingLayer
from kfac2.optim.layers.linear import LinearLayer, ReplicatedLinearLayer, TransposedLinearLayer
from kfac2.optim.layers.norm import BatchNormLayer, GroupNormLayer, LayerNormLayer, NormLayer
from kfac2.optim.layers.registry import ADAPTERS, adapter_of, register_layer, why_without_adapter

__all__ = [
    "ADAPTERS",
    "Basis",
    "BatchNormLayer",
    "ConvolutionLayer",
    "EmbeddingLayer",
    "GroupNormLayer",
    "InProjectionLayer",
    "Layer",
    "LayerNormLayer",
    "LinearLayer",
    "Moments",
    "NormLayer",
    "ReplicatedLinearLayer",
    "Totals",
    "TransposedConvolutionLayer",
    "TransposedLinearLayer",
    "adapter_of",
    "register_layer",
    "why_without_adapter",
]
