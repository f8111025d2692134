"""Damping that finds itself: the Levenberg-Marquardt rule of Martens and Grosse (2015), Section 6.5.

Every T₁ steps the change of the batch's loss h by the step δ is compared with what its quadratic model foretold,

    ρ = (h(θ + δ) − h(θ)) / (M(δ) − M(0)),    M(δ) − M(0) = ∇hᵀδ + ½ δᵀFδ,

with the same batch's exact Fisher F. A model that foretells well (ρ > 3/4) needs less damping and λ is multiplied by
ω^{T₁}; one that does not (ρ < 1/4) needs more, and λ is divided by it. δ is what the step has done to the
preconditioned parameters, momentum, clipping and weight decay included; the others stand where the step has left
them. M is without λ, as kfac-jax has it by default.

Theirs is a step that M itself has scaled, so that M(δ) < M(0). Here η and μ are given, and where a step is too long
for them M foretells a rise, rightly: ρ is near 1, and λ would shrink at the very steps that are too long. So λ grows
where M(δ) ≥ M(0), and where the new loss is not finite.

The inverses take the λ that it has come to when they are due by their own interval, so that a λ which stands still
gives the training that it would give if it were fixed.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfac2.optim.options import SharedOptions
from kfac2.optim.preconditioner import Preconditioner
from kfac2.optim.quadratic import Changes, Forward, Loss, changes_by_step

LOWER, UPPER = 1 / 4, 3 / 4
LEAD = 3.0
"""λ stays within this factor of the one in the inverses, whose steps are what is judged, until they are refreshed."""
STATE = "damping"


class LevenbergMarquardt(NamedTuple):
    """The rule's constants; the defaults are Martens and Grosse's.

    Raises, where it is given to an optimizer, ``ValueError`` for a value out of its range.
    """

    interval: int = 5
    """T₁: λ is adapted after every so many steps."""
    decay: float = 19 / 20
    """ω: λ is multiplied or divided by ``decay ** interval``."""
    bounds: tuple[float, float] = (1e-6, 1e2)
    """λ stays within them."""

    def check(self, damping: float) -> None:
        if not (isinstance(self.interval, int) and self.interval >= 1):
            raise ValueError(
                f"interval of adaptive_damping must be a positive integer, got {self.interval!r}"
            )
        if not 0 < self.decay < 1:
            raise ValueError(f"decay of adaptive_damping must lie between 0 and 1, got {self.decay}")
        least, most = self.bounds
        if not 0 < least <= most < float("inf"):
            raise ValueError(f"bounds of adaptive_damping must be positive and ascend, got {self.bounds}")
        if not least <= damping <= most:
            raise ValueError(
                f"damping={damping}, from where adaptive_damping begins, is outside its bounds {self.bounds}: "
                "choose another, or adaptive_damping=LevenbergMarquardt(bounds=...)"
            )

    def adapted(self, damping: Tensor, change: Tensor, predicted: Tensor) -> Tensor:
        """The next λ ``(R,)``, from ``h(θ + δ) − h(θ)`` and ``M(δ) − M(0)``.

        A step that changes nothing (η = 0) leaves it.
        """
        rho, factor = change / predicted, self.decay**self.interval
        sound = (predicted < 0) & change.isfinite()
        grows = ~(sound & (rho >= LOWER)) & ~((change == 0) & (predicted == 0))
        shrinks = sound & (rho > UPPER)
        new = torch.where(grows, damping / factor, torch.where(shrinks, damping * factor, damping))
        return new.clamp(*self.bounds)


class FixedDamping:
    """λ is that of the parameter groups, for all replicas."""

    def __init__(self, preconditioner: Preconditioner):
        self.preconditioner = preconditioner

    def prepare_step(self, options: SharedOptions) -> None:
        """Before the parameters are updated: refresh the inverses that are due."""
        if self.preconditioner.iteration % options.inverse_interval == 0:
            self.preconditioner.refresh_inverses(options.damping)

    def adapt(self, forward: Forward, loss: Loss) -> None:
        """After the step."""

    def state_dict(self) -> dict[str, Any]:
        """What it adds to the preconditioner's entry."""
        return {}

    def check_state_dict(self, entry: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` where the entry was saved with another kind of damping."""
        if STATE in entry:
            raise ValueError("the state was saved with adaptive_damping: build the optimizer with it too")

    def load_state_dict(self, entry: Mapping[str, Any]) -> None:
        """Take over a checked entry."""


class AdaptiveDamping(FixedDamping):
    """λ of each replica, ``damping`` ``(R,)``, float64, moved by the ``rule``; it begins at that of the groups."""

    def __init__(
        self, preconditioner: Preconditioner, rule: LevenbergMarquardt, model: nn.Module, damping: float
    ):
        super().__init__(preconditioner)
        rule.check(damping)
        self.rule, self._model = rule, model
        self.damping = torch.full((preconditioner.replicas,), damping, dtype=torch.float64)
        self._of_inverses = self.damping.clone()
        self._begun_at = 0
        self._before: dict[Tensor, Tensor] = {}
        """Where the preconditioned parameters were, between a step after which λ is adapted and that."""
        self._show()

    def prepare_step(self, options: SharedOptions) -> None:
        """Besides, remember where a step begins whose outcome will be compared."""
        preconditioner = self.preconditioner
        if self._before and self._step_is_over():
            raise RuntimeError(
                f"adaptive_damping: step {preconditioner.iteration} was to be judged: call optimizer.adapt_damping("
                "forward, loss) after every step(), with the same batch"
            )
        if preconditioner.iteration % options.inverse_interval == 0:
            preconditioner.refresh_inverses(self.damping)
            self._of_inverses = self.damping.clone()
        self._begun_at = preconditioner.iteration
        self._before = {p: p.detach().clone() for p in self._parameters()} if self._is_due() else {}

    def adapt(self, forward: Forward, loss: Loss) -> None:
        if not (self._before and self._step_is_over()):
            return
        before, self._before = self._before, {}
        changes = self._of_all_processes(
            changes_by_step(self._model, before, forward, loss, self.preconditioner.replicas)
        )
        adapted = self.rule.adapted(self.damping, *changes)
        self.damping = adapted.clamp(self._of_inverses / LEAD, self._of_inverses * LEAD)
        self._show()

    def state_dict(self) -> dict[str, Any]:
        return {STATE: {"next": self.damping.clone(), "of_inverses": self._of_inverses.clone()}}

    def check_state_dict(self, entry: Mapping[str, Any]) -> None:
        if STATE not in entry:
            raise ValueError(
                "the state was saved without adaptive_damping: build the optimizer without it too"
            )

    def load_state_dict(self, entry: Mapping[str, Any]) -> None:
        self.damping, self._of_inverses = (entry[STATE][key].cpu().clone() for key in ("next", "of_inverses"))
        self._before = {}
        self._show()

    def _is_due(self) -> bool:
        return (self.preconditioner.iteration + 1) % self.rule.interval == 0

    def _step_is_over(self) -> bool:
        """A step that failed half-way has not moved the iteration."""
        return self.preconditioner.iteration > self._begun_at

    def _parameters(self) -> list[nn.Parameter]:
        layers, plain = self.preconditioner.layers, self.preconditioner.plain
        return [p for i, layer in enumerate(layers) if i not in plain for p in layer.parameters]

    def _of_all_processes(self, changes: Changes) -> Changes:
        """Their sums, whose ratio is that of the mean loss, which is what the gradients' mean minimises."""
        processes = self.preconditioner.processes
        if processes.number > 1:
            (changes,) = processes.total([changes])
        return Changes(*(change.cpu() for change in changes))

    def _show(self) -> None:
        device = self.preconditioner.layers[0].weight.device
        self.preconditioner.diagnostics["damping"] = self.damping.to(device)


def damping_of(
    adaptive: bool | LevenbergMarquardt, preconditioner: Preconditioner, model: nn.Module, damping: float
) -> FixedDamping:
    """What the optimizer's ``adaptive_damping=`` asks for, at first λ = ``damping``."""
    if not adaptive:
        return FixedDamping(preconditioner)
    rule = LevenbergMarquardt() if adaptive is True else adaptive
    if not isinstance(rule, LevenbergMarquardt):
        raise TypeError(f"adaptive_damping must be True, False or a LevenbergMarquardt, got {rule!r}")
    return AdaptiveDamping(preconditioner, rule, model, damping)
