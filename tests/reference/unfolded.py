"""Other layers spelled out as ``nn.Linear`` layers, which the literal optimizers know."""

from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class Unfolded(nn.Module):
    """A convolution as one linear layer per group, on patches ``(B, *grid, channels · taps)``."""

    def __init__(self, layer: Convolution | Transposed) -> None:
        super().__init__()
        self.layer = [layer]  # in a list: its parameters are not this module's
        weights = per_group(layer, layer.weight.detach()).flatten(2)
        _, d_out, d_in = weights.shape
        bias = layer.bias is not None
        self.groups = nn.ModuleList(nn.Linear(d_in, d_out, bias) for _ in weights)
        for group, (linear, weight) in enumerate(zip(self.groups, weights, strict=True)):
            linear.weight.data = weight.clone()
            if layer.bias is not None:
                linear.bias.data = layer.bias.detach()[group * d_out : (group + 1) * d_out].clone()

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x)
        of_groups = patches.chunk(len(self.groups), dim=-2)
        outputs = [linear(part.flatten(-2)) for linear, part in zip(self.groups, of_groups, strict=True)]
        return torch.cat(outputs, dim=-1).movedim(-1, 1)

    def patches(self, x: Tensor) -> Tensor:
        """``(B, *grid, channels, taps)``."""
        (layer,) = self.layer
        transposed = isinstance(layer, Transposed)
        x = surrounded(layer, stuffed(layer, x) if transposed else x)
        steps = [1 for _ in layer.stride] if transposed else layer.stride
        reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        taps = []
        for tap in product(*map(range, layer.kernel_size)):
            first = [t * d for t, d in zip(tap, layer.dilation, strict=True)]
            last = [size - r + f for size, r, f in zip(x.shape[2:], reach, first, strict=True)]
            taps.append(x[(..., *(slice(*along) for along in zip(first, last, steps, strict=True)))])
        return torch.stack(taps, dim=-1).movedim(1, -2)

    def named_values(self) -> dict[str, Tensor]:
        """The weight and bias as the convolution has them."""
        (layer,) = self.layer
        weights = torch.stack([linear.weight.detach() for linear in self.groups])  # pyright: ignore
        weights = weights.unflatten(2, (-1, *layer.kernel_size))
        values = {"weight": of_all_groups(layer, weights)}
        if layer.bias is not None:
            values["bias"] = torch.cat([linear.bias.detach() for linear in self.groups])  # pyright: ignore
        return values


def per_group(layer: Convolution | Transposed, weight: Tensor) -> Tensor:
    """``(groups, out, in, *kernel)``: a transposed convolution is one with its kernel flipped."""
    weight = weight.unflatten(0, (layer.groups, -1))
    if isinstance(layer, Transposed):
        return weight.transpose(1, 2).flip(tuple(range(3, weight.dim())))
    return weight


def of_all_groups(layer: Convolution | Transposed, weights: Tensor) -> Tensor:
    """The inverse of ``per_group``."""
    if isinstance(layer, Transposed):
        weights = weights.transpose(1, 2).flip(tuple(range(3, weights.dim())))
    return weights.flatten(0, 1)


def stuffed(layer: Transposed, x: Tensor) -> Tensor:
    """``x`` with ``stride - 1`` zeros between neighbours."""
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], layer.stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    wide[(..., *(slice(None, None, step) for step in layer.stride))] = x
    return wide


def surrounded(layer: Convolution | Transposed, x: Tensor) -> Tensor:
    """``x`` with the zeros that the layer puts around it; where they are less than none, it is cut."""
    amounts: list[int] = []
    for axis in reversed(range(len(layer.kernel_size))):
        size = layer.padding[axis]
        assert isinstance(size, int)
        if isinstance(layer, Transposed):
            size = layer.dilation[axis] * (layer.kernel_size[axis] - 1) - size
            amounts += [size, size + layer.output_padding[axis]]
        else:
            amounts += [size, size]
    return pad(x, amounts)


def spelled_out(layer: nn.Module) -> nn.Module:
    return Unfolded(layer) if isinstance(layer, Convolution | Transposed) else layer


class Unfoldable(nn.Sequential):
    """A network whose convolutions are spelled out."""

    def __init__(self, network: nn.Sequential) -> None:
        super().__init__(*[spelled_out(layer) for layer in network])

    def named_values(self) -> dict[str, Tensor]:
        """Parameters under the network's names."""
        values: dict[str, Tensor] = {}
        for name, module in self.named_children():
            own = module.named_values() if isinstance(module, Unfolded) else dict(module.named_parameters())
            values |= {f"{name}.{key}": value.detach() for key, value in own.items()}
        return values
