"""K-FAC as a real torch optimizer: what a model and a training loop have to do with it."""

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfac2.curvature import INVERSES, CoarseSpace
from kfac2.optim.adaptive import LevenbergMarquardt, damping_of
from kfac2.optim.capture import Capture
from kfac2.optim.compiled import run_eagerly, uncompiled
from kfac2.optim.distributed import Processes
from kfac2.optim.losses import loss_of
from kfac2.optim.memory import limit_factors
from kfac2.optim.observation import sampled_backward
from kfac2.optim.options import SharedOptions, as_generators, check_choice, shared_options
from kfac2.optim.preconditioned import PreconditionedSGD
from kfac2.optim.preconditioner import Preconditioner
from kfac2.optim.rest import Rest, with_rest
from kfac2.optim.samples import set_sharing
from kfac2.optim.selection import Exclude, refuse_wrapped, select_layers
from kfac2.optim.state import placement


class KFAC(PreconditionedSGD):
    """SGD on a gradient preconditioned with block-diagonal K-FAC (eq. 2-4, 8-10).

    ```python
    for x, y in loader:
        optimizer.zero_grad()
        output = model(x)
        optimizer.update_curvature(output)  # a no-op unless a refresh is due
        criterion(output, y).backward()
        optimizer.step()
    ```

    Linear layers and convolutions padded with zeros are preconditioned (``register_layer`` adds other types);
    every other parameter takes the plain SGD update (``print(optimizer)`` or ``optimizer.coverage`` lists
    which and why). ``.grad`` stays the plain gradient. A layer without gradient is skipped; one that no
    refresh has seen yet takes plain steps.

    Args:
        model: the module whose forward pass makes the output; not wrapped for data parallelism. One that is
            compiled, before the optimizer is built or after, runs compiled in ordinary iterations and eagerly in
            those that refresh the curvature.
        lr, momentum, weight_decay: η, μ (heavy ball on the preconditioned gradient), β (added after
            preconditioning and clipping, to every parameter).
        dampening, nesterov, maximize: as ``torch.optim.SGD``'s, on the preconditioned gradient.
        damping: λ, not negative.
        adaptive_damping: True, or a ``LevenbergMarquardt`` with constants of its own: λ begins at ``damping`` and is
            moved by ``adapt_damping``, which must then be called after every step; each replica has its own.
        kl_clip: κ of eq. 10; None turns clipping off.
        likelihood: the loss whose curvature is used, which must be the one that is minimised or its scale
            is wrong: an ``nn.CrossEntropyLoss``, ``nn.BCEWithLogitsLoss`` or ``nn.MSELoss`` with its options,
            or a name: ``"categorical"`` (logits) is cross-entropy, mean over samples and positions;
            ``"bernoulli"`` (logits) is binary cross-entropy and ``"gaussian"`` (means) half the squared error,
            both summed over a sample's outputs, mean over samples.
        class_dim: the axis of the classes where a categorical output has more than two: -1 for
            ``(B, T, classes)``, 1 for ``(B, classes, H, W)``, a replica axis not counted.
        inverse: ``"eigen"`` (exact) or ``"tikhonov"`` (factored, eq. 8-9).
        factor_interval, inverse_interval: refresh factors and inverses every so many iterations.
        factor_decay: the largest ε of the running averages (Algorithm 1, line 2).
        generator: for the label draws; one, or one per replica. None makes one, seeded from the state of
            torch's, which is not advanced: two optimizers built in a row draw alike.
        params: torch parameter groups; all of the model's parameters by default. ``damping``,
            ``kl_clip`` and the intervals stand in the groups, so they can be scheduled, but must agree.
        exclude: module names, or a predicate on (name, module): layers left to plain SGD.
        weight_sharing: how a layer's positions (tokens, pixels) enter its factors (Eschenhagen et al. 2023).
            ``"expand"``: each as a sample of its own. ``"reduce"``: a sample's inputs averaged and its output
            gradients summed first, right for layers whose positions are averaged afterwards (global pooling).
            Or a mapping from module names; what it does not name is expanded.
        batch_axis: the axis of the layers' calls along which the samples run, where sizes do not tell:
            with as many time steps as samples, or with each sample's positions folded into the batch axis,
            one sample after the other. One for all layers that have that many axes (features not
            counted), or a mapping from module names. Only ``"reduce"`` and two levels need it: a
            layer whose samples are not found is an error there, and here has no coarse correction.
        max_factor_dim: of a layer's factor with more rows than this only the diagonal is kept (``coverage`` names
            it); None: no limit. A diagonal, not blocks: the rows of a large side are a vocabulary's words
            or a patch's entries, whose order means nothing, and blocks would be chosen by it. Of a softmax
            over many classes the output factor, the mean of ``diag(p) - p pᵀ``, is nearly diagonal.
        factor_dtype: of the factors and inverses, ``torch.float32`` or ``torch.float64``; None: the weight's,
            float32 at least. 16 bits are refused: running averages stand still (``bfloat16`` on the way from 1 to
            1.1 at 1.03).
        rest: what updates the parameters that are not preconditioned: ``"sgd"``, with this optimizer's own
            options, or a function that makes an optimizer of a list of them, as
            ``partial(torch.optim.AdamW, lr=1e-3)``. It stands in ``optimizer.rest``, steps, zeroes, saves and loads
            with this one, and its groups are the last of ``param_groups``: a scheduler on this optimizer drives
            all of them, one on ``optimizer.rest`` its own. A layer that is supported but never seen by a
            refresh stays with plain SGD.
        process_group: of ``torch.distributed``: the processes that train this model together, all by default.
            Build the optimizer from the plain module in each, call the model through
            ``DistributedDataParallel``, and let all make the same steps. The curvature is that of all their
            samples, each process drawing labels of its own; give all the same ``generator`` state.
        coarse: a ``CoarseSpace`` makes it two-level; ``TwoLevelKFAC`` builds the paper's.

    The curvature's memory (``print(optimizer)`` says how much) is taken at the first ``update_curvature``, for
    the layers that are trainable by then, where the parameters are then; frozen layers take none.

    Raises:
        ValueError: an option out of its range, an unknown name, or a model that cannot be captured.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        *,
        momentum: float = 0.9,
        weight_decay: float = 1e-3,
        dampening: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        damping: float = 1e-2,
        adaptive_damping: bool | LevenbergMarquardt = False,
        kl_clip: float | None = 1e-3,
        likelihood: str | nn.Module = "categorical",
        class_dim: int | None = None,
        inverse: str = "eigen",
        factor_interval: int = 10,
        inverse_interval: int = 100,
        factor_decay: float = 0.95,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        params: Iterable[Any] | None = None,
        exclude: Exclude = (),
        weight_sharing: str | Mapping[str, str] = "expand",
        batch_axis: int | Mapping[str, int] | None = None,
        max_factor_dim: int | None = 8192,
        factor_dtype: torch.dtype | None = None,
        rest: Rest = "sgd",
        process_group: Any = None,
        coarse: CoarseSpace | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"K-FAC needs the model itself, not {type(model).__name__}: KFAC(model, lr=...)")
        refuse_wrapped(model)
        model, called = uncompiled(model), model
        loss = loss_of(likelihood, class_dim)
        check_choice("inverse", inverse, INVERSES)
        if not 0 <= factor_decay < 1:
            raise ValueError(f"factor_decay must be in [0, 1), got {factor_decay}")
        super().__init__(
            model.parameters() if params is None else params,
            SharedOptions(damping, kl_clip, factor_interval, inverse_interval),
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            dampening=dampening,
            nesterov=nesterov,
            maximize=maximize,
        )
        optimized = {p for group in self.param_groups for p in group["params"]}
        layers, entries = select_layers(model, optimized, exclude)
        set_sharing(layers, weight_sharing, batch_axis)
        limit_factors(layers, max_factor_dim, factor_dtype)
        self._split_rest(rest, {p for layer in layers for p in layer.parameters})
        self._entries = with_rest(entries, self.rest)
        self.preconditioner = Preconditioner(
            layers, self.param_groups, inverse, factor_decay, coarse, Processes(process_group)
        )
        first = shared_options(self._own_groups).damping
        self._damping = damping_of(adaptive_damping, self.preconditioner, called, first)
        self._loss = loss._replace(replicas=layers[0].replicas if layers[0].replicated else None)
        self._generators = as_generators(generator, layers[0].replicas)
        self._placement = placement(self.param_groups)
        this = weakref.ref(self)  # so that an optimizer nobody holds is gone at once, and its hooks with it
        self._capture = Capture(
            model,
            layers,
            self.preconditioner.plain,
            due=lambda: (optimizer := this()) is not None and optimizer.refresh_is_due,
        )
        self._is_captured = lambda: (optimizer := this()) is not None and optimizer._captures
        self._bypass = run_eagerly(called, self._is_captured)
        if self._bypass is not None:
            weakref.finalize(self, self._bypass.remove).atexit = False
        self._look_ahead()
        self._told_unseen = False

    # -- what the training loop calls ---------------------------------------------------------------

    def update_curvature(
        self,
        output: Tensor,
        labels: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Observe the curvature at the model's ``output``; does nothing unless a refresh is due.

        Call it between the forward pass and ``backward()``. Several micro-batches before one ``step``
        add up, to the curvature of the mean of their losses, and so do several calls of a layer: behind
        one output may stand several forward passes since the latest step.

        Args:
            output: what the model returned, or what was made of it, ``([R,] B, ...)``.
            labels: used instead of labels drawn from the model's prediction; the data's give the
                empirical Fisher. Shape of ``output``, without the class axis if categorical.
            targets: the data's labels where the loss's curvature depends on them (``ignore_index``, class
                weights, ``pos_weight``), in the shape of ``labels``, which stand in for them.
            mask: True where a label counts in the loss; bool, of the labels' shape or its first axes.

        Raises:
            TypeError, ValueError: an argument of a wrong type or shape, in any iteration.
            RuntimeError: an output without a forward pass of the model since the latest step behind it, or
                with layers hidden in reentrant activation checkpointing.
        """
        self._loss.check(output, labels, targets, mask)
        if not self.refresh_is_due:
            return
        self._follow_model()
        preconditioner, samples = self.preconditioner, output.shape[self._loss.leading - 1]
        generators = preconditioner.processes.generators(self._generators)
        if samples == 0:
            preconditioner.end_batch()
            return
        if preconditioner.iteration == 0:
            self._loss.warn_of_probabilities(output)
            self._loss.warn_of_unknown_targets(output, labels, targets, mask)
        ignoring = self._loss.ignores(output, labels if targets is None else targets, mask)

        def visit(index: int, inputs: Tensor, gradients: Tensor, call: int) -> None:
            preconditioner.observe(index, inputs, gradients, samples, call, ignoring)

        with torch.autocast(output.device.type, enabled=False):
            try:
                loss = self._loss.sample(output, generators, labels, targets, mask)
                with sampled_backward():
                    nodes = self._capture.backpropagate(loss, visit)
                preconditioner.end_batch(nodes)
            except BaseException:
                preconditioner.discard_sample()  # half a batch must not count, nor what it was to add to
                raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients; batches observed with them leave no trace in the next curvature sample."""
        self.preconditioner.gradients_zeroed()
        super().zero_grad(set_to_none)
        self._look_ahead()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        """Take one step; a ``closure`` is evaluated first, with grad enabled, and its value returned.

        Raises:
            RuntimeError: a refresh is due and ``update_curvature`` was not called, an earlier step was to be judged
                and ``adapt_damping`` was not called, a layer has never had finite curvature, or ``damping`` is zero
                and the curvature singular from the start.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._only_makes_state():
            return loss
        self._follow_model()
        options, preconditioner = shared_options(self._own_groups), self.preconditioner
        if self.refresh_is_due:
            preconditioner.refresh_factors()
            self._capture.release()
            self._tell_unseen_layers()
        self._damping.prepare_step(options)
        gradients, active = preconditioner.gradients()
        updates = preconditioner.precondition(gradients, active)
        lrs = [float(group["lr"]) for group in self._own_groups]
        preconditioner.clip(updates, gradients, lrs, options.kl_clip)
        self._update_parameters(preconditioner.split(updates, active))
        self._step_rest()
        preconditioner.iteration += 1
        self._look_ahead()
        return loss

    def adapt_damping(self, forward: Callable[[], Tensor], loss: Callable[[Tensor], Tensor]) -> None:
        """Judge the step just taken, and adapt λ to it; does nothing without ``adaptive_damping=`` or if not due.

        ```python
        optimizer.step()
        optimizer.adapt_damping(lambda: model(x), lambda output: criterion(output, y))
        ```

        λ is in ``diagnostics["damping"]``. A loss that is not finite makes it grow.

        Args:
            forward: runs the model on the step's batch, outside autocast, and returns its output ``([R,] B, ...)``.
                It is called twice, with the same random numbers and without trace in the model's buffers.
            loss: what is minimised, of such an output: a scalar, or each replica's ``(R,)``. With several processes,
                each one's as it is back-propagated there.

        Raises:
            TypeError, ValueError: what they return has a wrong type or shape.
            RuntimeError: the output does not depend on the model's parameters.
        """
        self._damping.adapt(forward, loss)

    @property
    def refresh_is_due(self) -> bool:
        """Whether the coming step refreshes the factors: then, and only then, forward passes are captured
        and ``update_curvature`` must be called."""
        interval = shared_options(self._own_groups).factor_interval
        return self.preconditioner.iteration % interval == 0 and self.preconditioner.has_trainable_layer()

    @property
    def _captures(self) -> bool:
        return torch.is_grad_enabled() and self._capture.detach.alive and self.refresh_is_due

    def detach(self) -> None:
        """Take the optimizer's hook off the model: after training, before scripting, exporting or copying.

        It does not come back: to train on, build a new optimizer. One that is gone has done it by itself.
        """
        self._capture.detach()
        if self._bypass is not None:
            self._bypass.remove()

    def _look_ahead(self) -> None:
        if self._bypass is not None and self._capture.detach.alive:
            self._bypass.look_ahead(self.refresh_is_due, self._is_captured)

    def _tell_unseen_layers(self) -> None:
        unseen = [self.preconditioner.layers[i].name for i in self.preconditioner.allocation.unseen()]
        if unseen and not self._told_unseen:
            warnings.warn(
                f"the first refresh has seen no call of layers {', '.join(unseen)}: they take plain steps "
                "until one does. Where the model reads their weights without calling them, exclude them",
            )
        self._told_unseen = True
