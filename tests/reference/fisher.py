"""Explicit Fisher matrices of small networks, from one backward pass per sample.

The parameters of layer i are one matrix ``[W_i b_i]`` of shape ``(out, in [+ 1])``; ``vec`` stacks
its columns, so that ``(A kron G) vec(V) = vec(G V A)`` for a symmetric ``A``, as in the paper. A
convolution is a linear layer of its patches: ``W_i`` has shape ``(out, in · kh · kw)``.
"""

from collections.abc import Mapping, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from tests.reference.maps import Layer


def vec(matrix: Tensor) -> Tensor:
    """The columns of ``matrix``, one below the other."""
    return torch.cat(list(matrix.unbind(dim=1)))


def unvec(vector: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of ``vec``: a matrix of shape ``(rows, columns)``."""
    return torch.stack(list(vector.split(rows)), dim=1).reshape(rows, columns)


def negative_log_likelihood(output: Tensor, labels: Tensor, likelihood: str) -> Tensor:
    """One number per sample, shape ``(B,)``; summed over outputs, the Gaussian of unit variance."""
    if likelihood == "gaussian":
        losses = (output - labels) ** 2 / 2
    elif likelihood == "bernoulli":
        losses = -labels * logsigmoid(output) - (1 - labels) * logsigmoid(-output)
    elif likelihood == "categorical":
        losses = output.logsumexp(dim=1) - output[torch.arange(len(output)), labels]
    else:
        raise ValueError(f"no literal likelihood {likelihood!r}")
    return losses.reshape(len(output), -1).sum(dim=1)


def linear_layers(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, Layer]:
    """The linear layers and convolutions of ``model`` by name, in module order."""
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_plain_convolution(module)) and name not in exclude
    }


def is_plain_convolution(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether one matrix maps every patch, zeros around the image, to the output."""
    return isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"


def layer_matrix(name: str, values: Mapping[str, Tensor]) -> Tensor:
    """``[W b]`` of one layer, from values (gradients, updates) keyed by parameter name."""
    columns = [values[f"{name}.weight"].flatten(1)]
    if f"{name}.bias" in values:
        columns.append(values[f"{name}.bias"].unsqueeze(1))
    return torch.cat(columns, dim=1)


def parameter_vector(names: Sequence[str], values: Mapping[str, Tensor]) -> Tensor:
    """``[vec [W_1 b_1]; vec [W_2 b_2]; ...]``, shape ``(n,)``."""
    return torch.cat([vec(layer_matrix(name, values)) for name in names])


def split_parameter_vector(vector: Tensor, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The inverse of ``parameter_vector``: tensors keyed by parameter name."""
    values: dict[str, Tensor] = {}
    parts = vector.split([layer_size(layer) for layer in layers.values()])
    for (name, layer), part in zip(layers.items(), parts, strict=True):
        out = len(layer.weight)
        matrix = unvec(part, out, len(part) // out)
        values[f"{name}.weight"] = matrix[:, : layer.weight.numel() // out].reshape(layer.weight.shape)
        if layer.bias is not None:
            values[f"{name}.bias"] = matrix[:, -1]
    return values


def layer_size(layer: Layer) -> int:
    """Number of parameters, the bias included."""
    return sum(parameter.numel() for parameter in layer.parameters())


def restriction(sizes: Sequence[int]) -> Tensor:
    """``Z`` of eq. 5, shape ``(L, n)``: one where the parameter belongs to the layer."""
    return torch.block_diag(*[torch.ones(1, size, dtype=torch.float64) for size in sizes])


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    """The gradient of ``loss`` w.r.t. the parameters of ``linear_layers``, shape ``(n,)``."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, retain_graph=True)
    return parameter_vector(list(linear_layers(model)), dict(zip(names, grads, strict=True)))


def per_sample_gradients(model: nn.Module, inputs: Tensor, labels: Tensor, likelihood: str) -> Tensor:
    """Gradients of the per-sample negative log-likelihood, shape ``(B, n)``, a pass per sample."""
    rows = []
    for x, y in zip(inputs, labels, strict=True):
        loss = negative_log_likelihood(model(x[None]), y[None], likelihood).sum()
        rows.append(gradient(model, loss))
    return torch.stack(rows)


def labelled_fisher(model: nn.Module, inputs: Tensor, labels: Tensor, likelihood: str) -> Tensor:
    """``F = E[grad grad^T]`` over the samples with the given labels, shape ``(n, n)``."""
    rows = per_sample_gradients(model, inputs, labels, likelihood)
    return sum((torch.outer(row, row) for row in rows), torch.zeros(())) / len(rows)


def gaussian_fisher(model: nn.Module, inputs: Tensor) -> Tensor:
    """The true Fisher ``E[J^T J]`` of a unit-variance Gaussian, no labels needed, ``(n, n)``."""
    total = torch.zeros(())
    for x in inputs:
        jacobian = torch.stack([gradient(model, unit) for unit in model(x[None])[0]])
        total = total + jacobian.T @ jacobian
    return total / len(inputs)
