"""Literal one-level K-FAC in float64: one dense ``n x n`` preconditioner, nothing clever.

An oracle for small networks of ``nn.Linear`` and ``nn.Conv2d`` layers and anything else, which is
trained by SGD. A replicated model is checked against one twin per replica.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from math import sqrt

import torch
from torch import Tensor, nn

from tests.reference.fisher import (
    layer_size,
    linear_layers,
    negative_log_likelihood,
    parameter_vector,
    split_parameter_vector,
)
from tests.reference.maps import Layer, input_map, output_map, positions, rows

PerLayer = dict[str, Tensor]  # maps, see maps.py


def mean_outer(left: Tensor, right: Tensor) -> Tensor:
    """``E[left right^T]`` over samples and positions, from ``(B, m, *grid)`` and ``(B, n, *grid)``."""
    return torch.einsum("rm,rn->mn", rows(left), rows(right)) / len(rows(left))


def eye_like(matrix: Tensor) -> Tensor:
    return torch.eye(len(matrix), dtype=matrix.dtype)


def damped_block_inverse(A: Tensor, G: Tensor, damping: float, inverse: str) -> Tensor:
    """The dense inverse of one layer's ``A kron G + λ I``, or of its factored form (eq. 8)."""
    if inverse == "eigen":
        block = torch.kron(A, G)
        return torch.linalg.inv(block + damping * eye_like(block))
    pi = sqrt((A.trace() / len(A)) / (G.trace() / len(G)))
    damped_A = A + pi * sqrt(damping) * eye_like(A)
    damped_G = G + sqrt(damping) / pi * eye_like(G)
    return torch.linalg.inv(torch.kron(damped_A, damped_G))


class LiteralKFAC:
    """One-level K-FAC with labels given, eq. 2-4 and 8-10.

    ``lr`` and ``weight_decay`` are numbers or mappings from parameter names to numbers. After each
    ``step``, ``clips`` has one more ν and ``clip_norms`` one more ``Σ_i η_i² |V_i · ∇_i|``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float | Mapping[str, float],
        momentum: float,
        weight_decay: float | Mapping[str, float],
        damping: float,
        kl_clip: float | None,
        likelihood: str,
        inverse: str,
        factor_interval: int,
        inverse_interval: int,
        factor_decay: float = 0.95,
        exclude: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.layers = linear_layers(model, exclude)
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.damping = damping
        self.kl_clip = kl_clip
        self.likelihood = likelihood
        self.inverse = inverse
        self.factor_interval = factor_interval
        self.inverse_interval = inverse_interval
        self.factor_decay = factor_decay
        self.t = 0
        self.averages: dict[Hashable, Tensor] = {}
        self.preconditioned: dict[str, Layer] = {}
        self.preconditioner = torch.empty(0, 0, dtype=torch.float64)
        self.momenta: dict[str, Tensor] = {}
        self.clips: list[float] = []
        self.clip_norms: list[float] = []

    def step(self, inputs: Tensor, labels: Tensor, training_loss: Callable[[Tensor], Tensor]) -> None:
        """One iteration: ``labels`` for the curvature, ``training_loss`` for the gradient."""
        self.t += 1
        a, outputs, output = self.forward(inputs)
        if (self.t - 1) % self.factor_interval == 0:
            self.average(self.statistics(a, self.output_gradients(outputs, output, labels)))
        if (self.t - 1) % self.inverse_interval == 0:
            self.preconditioned = {
                name: layer for name, layer in self.layers.items() if ("A", name) in self.averages
            }
            self.preconditioner = self.form_preconditioner()
        self.update(training_loss(output))

    def forward(self, inputs: Tensor) -> tuple[PerLayer, PerLayer, Tensor]:
        """The layers' ``a`` and outputs as maps; the model's output."""
        a: PerLayer = {}
        outputs: PerLayer = {}

        def capture(name: str, layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
            def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                a[name], outputs[name] = input_map(layer, args[0].detach(), output), output
                return output.clone()  # a ReLU in place changes the copy, not what is kept

            return hook

        handles = [layer.register_forward_hook(capture(name, layer)) for name, layer in self.layers.items()]
        output = self.model(inputs)
        for handle in handles:
            handle.remove()
        return a, outputs, output

    def output_gradients(self, outputs: PerLayer, output: Tensor, labels: Tensor) -> PerLayer:
        """``g_i`` as maps: gradients of the summed negative log-likelihood."""
        loss = negative_log_likelihood(output, labels, self.likelihood).sum()
        grads = torch.autograd.grad(loss, list(outputs.values()), retain_graph=True)
        return {name: output_map(self.layers[name], g) for name, g in zip(outputs, grads, strict=True)}

    def statistics(self, a: PerLayer, g: PerLayer) -> dict[Hashable, Tensor]:
        """This batch's ``A_i`` and ``G_i`` (eq. 2): the positions' mean and their sum."""
        factors: dict[Hashable, Tensor] = {}
        for name in a:
            factors["A", name] = mean_outer(a[name], a[name])
            factors["G", name] = positions(g[name]) * mean_outer(g[name], g[name])
        return factors

    def average(self, statistics: dict[Hashable, Tensor]) -> None:
        """Running averages with decay ``ε_t``; what is new starts from its first observation."""
        decay = min(1 - 1 / self.t, self.factor_decay)
        for key, value in statistics.items():
            old = self.averages.get(key, value)
            self.averages[key] = decay * old + (1 - decay) * value

    def form_preconditioner(self) -> Tensor:
        """``blockdiag(F_ii + λ I)^{-1}``, shape ``(n, n)``."""
        blocks = [
            damped_block_inverse(
                self.averages["A", name], self.averages["G", name], self.damping, self.inverse
            )
            for name in self.preconditioned
        ]
        return torch.block_diag(*blocks)

    def update(self, loss: Tensor) -> None:
        """Precondition, clip, add weight decay, momentum, step."""
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients = {n: g for n, g in zip(names, grads, strict=True) if g is not None}
        nabla = parameter_vector(list(self.preconditioned), gradients)
        natural = split_parameter_vector(self.precondition(nabla), self.preconditioned)
        nu = self.clip(natural, gradients)
        for name, parameter in zip(names, parameters, strict=True):
            if name not in gradients:
                continue
            direction = nu * natural[name] if name in natural else gradients[name]
            direction = direction + of(self.weight_decay, name) * parameter.detach()
            if name in self.momenta:
                direction = self.momentum * self.momenta[name] + direction
            self.momenta[name] = direction
            parameter.data = parameter.data - of(self.lr, name) * direction

    def precondition(self, nabla: Tensor) -> Tensor:
        """Eq. 4, on the gradient of all preconditioned layers ``(n,)``."""
        return self.preconditioner @ nabla

    def clip(self, natural: PerLayer, gradients: PerLayer) -> float:
        """``ν`` of eq. 10; a layer's weight and bias count each with its own learning rate."""
        norm = 0.0
        for layer in self.preconditioned:
            parts = [name for name in (f"{layer}.weight", f"{layer}.bias") if name in natural]
            norm += abs(
                sum(of(self.lr, name) ** 2 * (natural[name] * gradients[name]).sum().item() for name in parts)
            )
        self.clip_norms.append(norm)
        self.clips.append(1.0 if self.kl_clip is None else min(1.0, sqrt(self.kl_clip / norm)))
        return self.clips[-1]

    @property
    def sizes(self) -> list[int]:
        """``n_i`` of the preconditioned layers."""
        return [layer_size(layer) for layer in self.preconditioned.values()]


def of(value: float | Mapping[str, float], name: str) -> float:
    return value[name] if isinstance(value, Mapping) else value
