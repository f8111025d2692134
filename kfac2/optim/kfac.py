"""K-FAC with one and two levels, as real torch optimizers."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from kfac2.curvature import INVERSES, CoarseSpace, kl_clip_factor
from kfac2.curvature.averages import decay_at, matrices
from kfac2.optim.capture import Capture
from kfac2.optim.likelihood import LIKELIHOODS
from kfac2.optim.selection import Exclude, refuse_wrapped, select_layers
from kfac2.optim.stacks import Sample, make_stacks

SHARED_OPTIONS = ("damping", "kl_clip", "factor_interval", "inverse_interval")


class KFAC(torch.optim.SGD):
    """SGD on a gradient preconditioned with block-diagonal K-FAC (eq. 2-4, 8-10).

    ::

        for x, y in loader:
            optimizer.zero_grad()
            output = model(x)
            optimizer.update_curvature(output)      # a no-op unless a refresh is due
            criterion(output, y).backward()
            optimizer.step()

    Linear layers are preconditioned; every other parameter takes the plain SGD update
    (``print(optimizer)`` or ``optimizer.coverage`` lists which and why). ``.grad`` stays the plain
    gradient. A layer without gradient is skipped; one that no refresh has seen yet takes plain steps.

    Args:
        model: the module whose forward pass makes the output. Not compiled, not data-parallel.
        lr, momentum, weight_decay: η, μ (heavy ball on the preconditioned gradient), β (added after
            preconditioning and clipping, to every parameter).
        damping: λ, not negative.
        kl_clip: κ of eq. 10; None turns clipping off.
        likelihood: what the output parametrises: ``"categorical"`` (logits ``(B, classes)``),
            ``"bernoulli"`` (logits ``(B, outputs)`` or ``(B,)``) or ``"gaussian"`` (means, unit variance).
            A replicated model's output has a leading replica axis.
        inverse: ``"eigen"`` (exact) or ``"tikhonov"`` (factored, eq. 8-9).
        factor_interval, inverse_interval: refresh factors and inverses every so many iterations.
        factor_decay: the largest ε of the running averages (Algorithm 1, line 2).
        generator: for the label draws; one, or one per replica. None makes one, seeded from torch's.
        params: torch parameter groups; all of the model's parameters by default. ``damping``,
            ``kl_clip`` and the intervals stand in the groups, so they can be scheduled, but must agree.
        exclude: module names, or a predicate on (name, module): layers left to plain SGD.

    Raises:
        ValueError: an option out of its range, an unknown name, or a model that cannot be captured.
    """

    coarse: CoarseSpace | None = None

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        *,
        momentum: float = 0.9,
        weight_decay: float = 1e-3,
        damping: float = 1e-2,
        kl_clip: float | None = 1e-3,
        likelihood: str = "categorical",
        inverse: str = "eigen",
        factor_interval: int = 10,
        inverse_interval: int = 100,
        factor_decay: float = 0.95,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        params: Iterable[Any] | None = None,
        exclude: Exclude = (),
    ):
        refuse_wrapped(model)
        _choose("likelihood", likelihood, LIKELIHOODS)
        _choose("inverse", inverse, INVERSES)
        if not 0 <= factor_decay < 1:
            raise ValueError(f"factor_decay must be in [0, 1), got {factor_decay}")
        self._built = False
        super().__init__(
            model.parameters() if params is None else params,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
        )
        shared = dict(zip(SHARED_OPTIONS, (damping, kl_clip, factor_interval, inverse_interval), strict=True))
        self.defaults.update(shared)
        for group in self.param_groups:
            group.update(shared | group)
        self._built = True
        self._options()

        optimized = {p for group in self.param_groups for p in group["params"]}
        self.layers, self.coverage = select_layers(model, optimized, exclude)
        self.replicated, self.replicas = self.layers[0].replicated, self.layers[0].replicas
        self.iteration = 0
        self.factor_decay, self.inverse = factor_decay, inverse
        self.rejected_samples = 0
        """Layer samples (per replica) that were not finite and left the running averages alone."""
        self.failed_inverses = 0
        """Inverses (per layer and replica) that could not be computed and left the old one in place."""
        self.diverged = torch.zeros(self.replicas, dtype=torch.bool)
        """Replicas that had no inverse to fall back on; their parameters become NaN."""
        self.diagnostics: dict[str, Tensor] = {}
        """Of the latest step, per replica: ``nu``, and with a coarse space ``coarse_ratio``."""
        self._likelihood = LIKELIHOODS[likelihood]
        self._generators = _generators(generator, self.replicas)
        self._stacks = make_stacks(self.layers, self.param_groups, inverse)
        # The fused update walks raw memory: parameters and gradients must have one layout.
        self._contiguous = all(p.is_contiguous() and p.device.type in ("cpu", "cuda") for p in optimized)
        self._sample: dict[int, Sample] = {}
        self._ready = [False] * len(self.layers)
        self._warned = False
        modules = [layer.module for layer in self.layers]
        self._capture = Capture(model, [layer.name for layer in self.layers], modules, self._due)

    # -- what the training loop calls ---------------------------------------------------------------

    def update_curvature(self, output: Tensor, labels: Tensor | None = None) -> None:
        """Observe the curvature at the model's latest ``output``; does nothing unless a refresh is due.

        Call it between the forward pass and ``backward()``. Several micro-batches before one ``step``
        add up.

        Args:
            output: what the model returned, ``([R,] B, ...)``.
            labels: used instead of labels drawn from the model's prediction; the data's give the
                empirical Fisher. Shape of ``output``, without the class axis if categorical.

        Raises:
            ValueError: labels or inputs of a wrong shape.
            RuntimeError: an output that is not the latest forward pass's.
        """
        if not self._due():
            return
        _refuse_distributed()
        samples = self._check_output(output)
        if labels is None:
            labels = self._likelihood.draw(output.detach(), self._generators)
        elif labels.shape != self._likelihood.label_shape(output):
            expected = tuple(self._likelihood.label_shape(output))
            raise ValueError(f"labels have shape {tuple(labels.shape)}, the output asks for {expected}")
        sums: dict[int, tuple[Tensor, Tensor]] = {}

        def visit(index: int, inputs: Tensor, gradients: Tensor) -> None:
            layer = self.layers[index]
            a, g = layer.input_columns(inputs), layer.gradient_columns(gradients)
            if a.shape[-1] != samples:
                raise ValueError(
                    f"layer {layer.name!r} saw {a.shape[-1]} samples, the output has {samples}: leave the "
                    f"layer to plain SGD with exclude=[{layer.name!r}]"
                )
            sample = Sample(a @ a.mT, g @ g.mT, samples)
            self._sample[index] = sample.plus(self._sample.get(index))
            if self.coarse is not None:
                sums[index] = self.coarse.project(index, a, g)

        with torch.autocast(output.device.type, enabled=False):
            self._capture.backpropagate(self._likelihood.negative_log(output, labels), visit)
            if self.coarse is not None:
                self.coarse.accumulate(sums)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        """One update; a ``closure`` is evaluated first, with grad enabled, and its value returned.

        Raises:
            RuntimeError: a refresh is due and ``update_curvature`` was not called, or a layer has no
                finite curvature and no earlier inverse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        damping, kl_clip, factor_interval, inverse_interval = self._options()
        if self.iteration % factor_interval == 0:
            self._refresh_factors()
        if self.iteration % inverse_interval == 0:
            self._refresh_inverses(damping)
        gradients, active = self._stacked_gradients()
        updates = self._precondition(gradients, active)
        self._clip(updates, gradients, kl_clip)
        self._update_parameters(updates, active)
        self.iteration += 1
        return loss

    # -- the named parts of a step ------------------------------------------------------------------

    def _refresh_factors(self) -> None:
        if not self._sample:
            raise RuntimeError(
                f"iteration {self.iteration + 1} refreshes the curvature: call "
                "optimizer.update_curvature(output) between the forward pass and backward()"
            )
        decay = decay_at(self.iteration + 1, self.factor_decay)
        rejected = [stack.fold(self._sample, decay) for stack in self._stacks]
        if self.coarse is not None:
            rejected.append(self.coarse.fold(decay))
        self._sample = {}
        self._capture.clear()
        self.rejected_samples += self._count(rejected, "curvature samples were not finite")

    def _refresh_inverses(self, damping: float) -> None:
        failed = [stack.blocks.refresh_inverse(damping) for stack in self._stacks]
        missing = [stack.blocks.missing_inverse() for stack in self._stacks]
        if self.coarse is not None:
            failed.append(self.coarse.refresh(damping))
            missing.append(~self.coarse.has_inverse())
        self.failed_inverses += self._count(failed, "inverses could not be computed")
        self.diverged |= torch.stack([m.any(0) if m.dim() == 2 else m for m in missing]).any(0).cpu()
        if self.diverged.any() and not self.replicated:
            raise RuntimeError(
                f"iteration {self.iteration + 1}: no finite curvature and no earlier inverse for layers "
                f"{self._names_of(missing)}. Lower lr, raise damping, or check the data for non-finite values"
            )
        for stack in self._stacks:
            for position, index in enumerate(stack.index.tolist()):
                self._ready[index] = bool(stack.blocks.attempted[position])

    def _stacked_gradients(self) -> tuple[list[Tensor], list[bool]]:
        """Plain gradients, one ``(n, R, d_out, d_in)`` per stack, and which layers take part."""
        active = [
            ready and layer.weight.grad is not None
            for ready, layer in zip(self._ready, self.layers, strict=True)
        ]
        return [stack.gradients(active) for stack in self._stacks], active

    def _precondition(self, gradients: list[Tensor], active: list[bool]) -> list[Tensor]:
        updates = [stack.precondition(g, active) for stack, g in zip(self._stacks, gradients, strict=True)]
        if self.coarse is None:
            return updates
        blocks = [(stack.index, g) for stack, g in zip(self._stacks, gradients, strict=True)]
        coefficients = self.coarse.solve(self.coarse.restrict(blocks))
        corrections = [
            stack.masked(c, active)
            for stack, c in zip(self._stacks, self.coarse.prolong(coefficients, blocks), strict=True)
        ]
        ratio = _squared_norm(corrections, like=updates) / _squared_norm(updates, like=updates)
        self.diagnostics["coarse_ratio"] = ratio.sqrt()
        return [u + c for u, c in zip(updates, corrections, strict=True)]

    def _clip(self, updates: list[Tensor], gradients: list[Tensor], kl_clip: float | None) -> None:
        """Scale the updates by ν, in place (eq. 10)."""
        if kl_clip is None:
            self.diagnostics["nu"] = torch.ones(self.replicas)
            return
        lrs = updates[0].new_tensor([float(group["lr"]) for group in self.param_groups])
        per_layer = [
            (u * g * lrs.square()[stack.groups]).sum((-2, -1)).abs()
            for stack, u, g in zip(self._stacks, updates, gradients, strict=True)
        ]
        nu = kl_clip_factor(torch.cat(per_layer).sum(0), kl_clip)
        for update in updates:
            update *= matrices(nu)
        self.diagnostics["nu"] = nu

    def _update_parameters(self, updates: list[Tensor], active: list[bool]) -> None:
        """SGD's own update (weight decay, heavy ball), on the preconditioned gradients."""
        preconditioned: dict[int, Tensor] = {}
        for stack, update in zip(self._stacks, updates, strict=True):
            preconditioned |= stack.split(update, active)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [preconditioned.get(id(p), p.grad) for p in params]
            buffers = [self.state[p].get("momentum_buffer") for p in params]
            first_time = [p for p, buffer in zip(params, buffers, strict=True) if buffer is None]
            sgd(
                params,
                grads,
                buffers,
                has_sparse_grad=False,
                foreach=group["foreach"],
                fused=(self._contiguous and all(g.is_contiguous() for g in grads)) or None,
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
            )
            if first_time and group["momentum"] != 0:
                for p, buffer in zip(params, buffers, strict=True):
                    self.state[p]["momentum_buffer"] = buffer

    # -- checks and small helpers -------------------------------------------------------------------

    def _due(self) -> bool:
        return self.iteration % self.param_groups[0]["factor_interval"] == 0

    def _options(self) -> tuple[float, float | None, int, int]:
        """damping, kl_clip and the intervals, checked: they may have been scheduled."""
        first = self.param_groups[0]
        for group in self.param_groups[1:]:
            for key in SHARED_OPTIONS:
                if group[key] != first[key]:
                    raise ValueError(f"{key} must agree in all parameter groups: {first[key]} and {group[key]}")
        damping, kl_clip, factor_interval, inverse_interval = (first[key] for key in SHARED_OPTIONS)
        if not 0 <= damping < float("inf"):
            raise ValueError(f"damping must be finite and not negative, got {damping}")
        if kl_clip is not None and not kl_clip > 0:
            raise ValueError(f"kl_clip must be positive (None turns clipping off), got {kl_clip}")
        for key in ("factor_interval", "inverse_interval"):
            if not (isinstance(first[key], int) and first[key] >= 1):
                raise ValueError(f"{key} must be a positive integer, got {first[key]!r}")
        return damping, kl_clip, factor_interval, inverse_interval

    def _check_output(self, output: Tensor) -> int:
        """The number of samples per replica."""
        leading = 2 if self.replicated else 1
        if not output.requires_grad:
            raise RuntimeError("output does not require grad: pass the model's output, made with grad enabled")
        if output.dim() < leading or (self.replicated and output.shape[0] != self.replicas):
            expected = f"({self.replicas}, batch, ...)" if self.replicated else "(batch, ...)"
            raise ValueError(f"output has shape {tuple(output.shape)}, expected {expected}")
        if self._likelihood is LIKELIHOODS["categorical"] and output.dim() != leading + 1:
            raise ValueError(
                f"output has shape {tuple(output.shape)}: a categorical likelihood needs one class axis "
                "after the batch; for single logits use likelihood='bernoulli'"
            )
        return output.shape[leading - 1]

    def _count(self, bad: list[Tensor], what: str) -> int:
        number = int(torch.stack([b.sum() for b in bad]).sum())
        if number and not self._warned:
            self._warned = True
            warnings.warn(
                f"iteration {self.iteration + 1}: {number} {what}; the earlier ones stay in use. Counted "
                "in rejected_samples and failed_inverses from now on, without another warning",
                RuntimeWarning,
                stacklevel=3,
            )
        return number

    def _names_of(self, missing: list[Tensor]) -> str:
        names = [
            self.layers[index].name
            for stack, mask in zip(self._stacks, missing, strict=False)
            for index, bad in zip(stack.index.tolist(), mask.any(1).tolist(), strict=True)
            if bad
        ]
        return ", ".join(names) or "(coarse matrix)"

    # -- state --------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while the optimizer is being built: its layers are fixed then."""
        if self._built:
            raise RuntimeError(
                "K-FAC fixes its layers when it is built: give it all parameters from the start (frozen "
                "ones are skipped until they have gradients), or build a new optimizer"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """SGD's state and a ``"preconditioner"`` entry keyed by module name.

        Taken between steps, it is everything needed to go on bit-identically.
        """
        layers = {
            self.layers[index].name: stack.blocks.state(position)
            for stack in self._stacks
            for position, index in enumerate(stack.index.tolist())
        }
        preconditioner = {
            "iteration": self.iteration,
            "layers": layers,
            "ready": list(self._ready),
            "coarse": None if self.coarse is None else self.coarse.state_dict(),
            "generators": [generator.get_state() for generator in self._generators],
            "rejected_samples": self.rejected_samples,
            "failed_inverses": self.failed_inverses,
            "diverged": self.diverged.clone(),
        }
        return super().state_dict() | {"preconditioner": preconditioner}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a ``state_dict`` of the same kind of optimizer on the same layers, on any device.

        Raises:
            ValueError: the state is another optimizer's or another model's.
        """
        if "preconditioner" not in state_dict:
            raise ValueError("the state dict has no 'preconditioner' entry: it is not a K-FAC optimizer's")
        state = state_dict["preconditioner"]
        names = {layer.name for layer in self.layers}
        if names != set(state["layers"]):
            differing = sorted(names ^ set(state["layers"]))
            raise ValueError(f"the state was saved with other layers; they differ in: {', '.join(differing)}")
        if (self.coarse is None) != (state["coarse"] is None):
            raise ValueError("one of the state and the optimizer has a coarse space, the other has none")
        for stack in self._stacks:
            stack.blocks.load([state["layers"][self.layers[i].name] for i in stack.index.tolist()])
        if self.coarse is not None:
            self.coarse.load_state_dict(state["coarse"])
        super().load_state_dict(state_dict)
        self.iteration, self._ready = state["iteration"], list(state["ready"])
        self.rejected_samples, self.failed_inverses = state["rejected_samples"], state["failed_inverses"]
        self.diverged = state["diverged"].clone()
        self._sample = {}
        self._capture.clear()
        _load_generators(self._generators, state["generators"])

    def __getstate__(self) -> Any:
        raise TypeError("a K-FAC optimizer is bound to its model's hooks: copy or pickle its state_dict()")

    def __repr__(self) -> str:
        lines = "\n".join(f"    {line}" for line in self.coverage)
        return f"{super().__repr__()}\nParameters:\n{lines}"


class TwoLevelKFAC(KFAC):
    """K-FAC with the coarse-space correction between layers (eq. 6): ``KFAC`` plus a ``CoarseSpace``.

    Args:
        coarse_fisher, coarse_grid, resample, coarse_weight: see ``CoarseSpace``.
        coarse: a ``CoarseSpace`` in place of those four.
        **options: as for ``KFAC``.
    """

    coarse: CoarseSpace

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        *,
        coarse_fisher: str = "kronecker",
        coarse_grid: str = "pairwise",
        resample: str = "nearest",
        coarse_weight: float = 1.0,
        coarse: CoarseSpace | None = None,
        **options: Any,
    ):
        if coarse is None:
            coarse = CoarseSpace(coarse_fisher, coarse_grid, resample, coarse_weight)
        super().__init__(model, lr, **options)
        self.coarse = coarse
        self.coarse.bind(len(self.layers), self.replicas, self.layers[0].weight.device)


def _choose(option: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {option} {value!r}: choose from {', '.join(choices)}")


def _generators(
    given: torch.Generator | Sequence[torch.Generator] | None, replicas: int
) -> list[torch.Generator]:
    if given is None:
        return [torch.Generator().manual_seed(int(torch.randint(2**62, ())))]
    generators = [given] if isinstance(given, torch.Generator) else list(given)
    if len(generators) not in (1, replicas):
        raise ValueError(f"{len(generators)} generators for {replicas} replicas: give one, or one for each")
    return generators


def _load_generators(generators: list[torch.Generator], states: list[Tensor]) -> None:
    try:
        for generator, saved in zip(generators, states, strict=True):
            generator.set_state(saved.cpu())
    except (RuntimeError, ValueError) as error:
        warnings.warn(f"the label draws start anew from the given generator: {error}", stacklevel=3)


def _refuse_distributed() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            "several processes train one model, and each would see different curvature: data parallelism "
            "is not supported"
        )


def _squared_norm(blocks: list[Tensor], like: list[Tensor]) -> Tensor:
    """Of ``blocks`` broadcast to the shapes of ``like``, per replica: ``(R,)``."""
    norms = [
        block.square().sum((-2, -1)) * (full.numel() / block.numel())
        for block, full in zip(blocks, like, strict=True)
    ]
    return torch.cat(norms).sum(0)
