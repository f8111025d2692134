"""What block-diagonal natural gradient does to a classifier's logits beside the whole one, on some images.

In function space: the first-order change of all logits by ``(F_λ)⁻¹ g`` with F's blocks alone, and with all of F. F is
the images' exact Fisher over the linear layers, a layer's weight and bias being one block.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.study.directions import Curvature, block_diagonal, full

AT_ONCE = 16
"""Images whose Jacobians are computed together."""


def dependencies(
    model: nn.Module, images: Tensor, targets: Tensor, dampings: tuple[float, ...]
) -> Iterator[dict[str, float]]:
    """For each λ (``damping``) the ``cosine`` and the length ``ratio`` of the changes of the logits ``(B, classes)``,
    blocks beside the whole; and the images' ``loss``."""
    logits = model(images).detach()
    T, m, sizes = layer_grams(model, images)
    p = logits.softmax(-1)
    loss = F.cross_entropy(logits, targets).item()
    S = torch.block_diag(*((each.diag() - torch.outer(each, each)) / len(p) for each in p))
    r = ((p - F.one_hot(targets, p.shape[-1])) / len(p)).flatten()
    for damping in dampings:
        c = Curvature(r[None], S[None], T[None], m[None], sizes, damping)
        blocks, whole = (c.seen(direction(c)) for direction in (block_diagonal, full))
        yield {
            "loss": loss,
            "damping": damping,
            "cosine": F.cosine_similarity(blocks, whole).item(),
            "ratio": (blocks.norm() / whole.norm()).item(),
        }


def layer_grams(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the logits' Jacobian by each linear layer's parameters, ``M_i`` ``(K, n_i)``, K of all images and classes:
    ``M_i M_iᵀ`` ``(L, K, K)``, ``M_i 1`` ``(L, K)`` and ``n_i`` ``(L,)``."""
    names = [
        [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    parameters = {name: model.get_parameter(name).detach() for own in names for name in own}

    def logits(values: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, values, (image[None],))[0]

    with sdpa_kernel(SDPBackend.MATH):  # the one that can be vectorised
        jacobian = vmap(jacrev(logits), in_dims=(None, 0), chunk_size=AT_ONCE)(parameters, images)
    grams, sums, sizes = [], [], []
    for own in names:
        M = torch.cat([jacobian.pop(name).flatten(2).flatten(0, 1) for name in own], dim=1)
        grams.append(M @ M.T)
        sums.append(M.sum(1))
        sizes.append(M.shape[1])
    return torch.stack(grams), torch.stack(sums), grams[0].new_tensor(sizes)
