"""What of the optimizer does not depend on how the curvature is observed: groups, update, reports, state."""

import warnings
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from kfac2.curvature import CoarseSpace
from kfac2.optim.adaptive import FixedDamping
from kfac2.optim.capture import Capture
from kfac2.optim.coverage import Coverage, Entry, summary
from kfac2.optim.options import SharedOptions, shared_options
from kfac2.optim.preconditioner import Preconditioner
from kfac2.optim.rest import Rest, check_same_rest, name_of, split_rest
from kfac2.optim.state import ENTRY, placement, with_carrier, without_entry


class PreconditionedSGD(torch.optim.SGD):
    """``torch.optim.SGD`` with a ``preconditioner``, whose options ``shared`` stand in all groups."""

    rest: torch.optim.Optimizer | None
    preconditioner: Preconditioner
    _capture: Capture
    _damping: FixedDamping
    _entries: list[Entry]
    _generators: list[torch.Generator]
    _placement: list[tuple[torch.dtype, torch.device]]

    def __init__(self, params: Iterable[Any], shared: SharedOptions, **sgd_options: Any):
        self._built = False
        super().__init__(params, **sgd_options)
        self.defaults.update(shared._asdict())
        for group in self.param_groups:
            group.update(shared._asdict() | group)
        self._built = True
        shared_options(self.param_groups)

    # -- parameter groups ---------------------------------------------------------------------------

    def _split_rest(self, rest: Rest, preconditioned: Collection[nn.Parameter]) -> None:
        self._number_of_own_groups = len(self.param_groups)
        self.rest = split_rest(rest, self.param_groups, preconditioned)
        self.param_groups.extend([] if self.rest is None else self.rest.param_groups)
        self._share_with_rest()

    @property
    def _own_groups(self) -> list[dict[str, Any]]:
        """The parameter groups but for the rest's."""
        return self.param_groups[: self._number_of_own_groups]

    def _share_with_rest(self) -> None:
        """The rest reads the groups and the state that are saved, loaded and scheduled here."""
        if self.rest is not None:
            self.rest.state = self.state
            self.rest.param_groups = self.param_groups[self._number_of_own_groups :]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Works only while the optimizer is being built, which fixes its layers.

        Raises:
            RuntimeError: the optimizer is built.
        """
        if self._built:
            raise RuntimeError(
                "K-FAC fixes its layers when it is built: give it all parameters from the start (frozen "
                "ones are skipped until they have gradients), or build a new optimizer"
            )
        super().add_param_group(param_group)

    def _follow_model(self) -> None:
        """After ``model.double()`` or ``model.to(device)`` the state follows the parameters."""
        now = placement(self.param_groups)
        if now == self._placement:
            return
        for p, own in self.state.items():
            moved = {key: x.to(p) for key, x in own.items() if isinstance(x, Tensor) and key != "step"}
            own.update(moved)  # a count of steps stays what it is, as in torch
        self.preconditioner.relocate()
        self._placement = now

    # -- reports ------------------------------------------------------------------------------------

    @property
    def coverage(self) -> list[Coverage]:
        """A line on each of the model's parameters: whether it is preconditioned, and why."""
        plain, notes = self._plain(), self.preconditioner.notes()
        return [entry.line(plain, notes) for entry in self._entries]

    @property
    def diagnostics(self) -> dict[str, Tensor]:
        """What the latest step did, per replica ``(R,)``: ``nu`` (ν of eq. 10), and with two levels
        ``coarse_ratio``, the norm of the coarse correction relative to the one-level update, and
        ``coarse_negative``, how many clearly negative eigenvalues the coarse matrix had, and
        ``coarse_indefinite``, 1 where it had any, else 0; with ``adaptive_damping`` the λ it has come to,
        ``damping``."""
        return self.preconditioner.diagnostics

    @property
    def diverged(self) -> Tensor:
        """Which replicas ``(R,)`` have diverged: their first statistics were not finite, and their
        parameters become NaN."""
        return self.preconditioner.diverged

    @property
    def failures(self) -> dict[str, Tensor]:
        """Counts since the first step, per replica ``(R,)``: ``rejected_samples`` and ``failed_inverses``."""
        return dict(self.preconditioner.failures.counts)

    @property
    def rejected_samples(self) -> int:
        """Curvature samples (per layer and replica) that were not finite and left the averages alone."""
        return int(self.failures["rejected_samples"].sum())

    @property
    def failed_inverses(self) -> int:
        """Inverses (per layer and replica) of finite factors that could not be computed: the old one stays in
        place, and a layer without one takes plain steps (its inverse is the identity)."""
        return int(self.failures["failed_inverses"].sum())

    @property
    def coarse(self) -> CoarseSpace | None:
        """The coarse space; None with one level."""
        return self.preconditioner.coarse

    def _plain(self) -> dict[int, str]:
        """Positions of the layers that take plain steps, with the reason."""
        unseen = dict.fromkeys(self.preconditioner.allocation.unseen(), "never seen by a refresh")
        return self.preconditioner.plain | unseen

    # -- update -------------------------------------------------------------------------------------

    def _update_parameters(self, preconditioned: dict[int, Tensor]) -> None:
        """SGD's own update (weight decay, heavy ball), with the preconditioned gradients by ``id``."""
        for group in self._own_groups:
            params = [p for p in group["params"] if p.grad is not None]
            buffers = [self.state[p].get("momentum_buffer") for p in params]
            started = [k for k, buffer in enumerate(buffers) if buffer is not None]
            if 0 < len(started) < len(params):  # torch's fused update wants all buffers or none
                new = [k for k, buffer in enumerate(buffers) if buffer is None]
                for chosen in (started, new):
                    some, own = [params[k] for k in chosen], [buffers[k] for k in chosen]
                    self._sgd(group, some, own, preconditioned)
            else:
                self._sgd(group, params, buffers, preconditioned)

    def _step_rest(self) -> None:
        if self.rest is not None:
            self.rest.step()

    def _sgd(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        buffers: list[Tensor | None],
        updates: dict[int, Tensor],
    ) -> None:
        """``buffers``: of all ``params`` or of none."""
        grads: list[Tensor] = [updates.get(id(p), p.grad) for p in params]  # pyright: ignore
        is_first = bool(buffers) and buffers[0] is None
        # The fused update walks raw memory: all that it reads together must have one layout.
        together = (*params, *grads, *(buffer for buffer in buffers if buffer is not None))
        kinds = set(self._placement)  # a set first: few of them, of hundreds of parameters
        fusible = all(device.type in ("cpu", "cuda") and not dtype.is_complex for dtype, device in kinds)
        fusible = fusible and all(map(Tensor.is_contiguous, together))
        sgd(
            params,
            grads,
            buffers,
            has_sparse_grad=False,
            foreach=group["foreach"],
            fused=fusible or None,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        if is_first and group["momentum"] != 0:
            for p, buffer in zip(params, buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer

    def _only_makes_state(self) -> bool:
        """``torch.distributed.checkpoint`` makes a fresh optimizer's state by a step without lr and gradients.

        It must not count as an iteration, nor put weight decay into the momentum.
        """
        if self.state or any(group["lr"] for group in self.param_groups):
            return False
        if any(p.grad.any() for group in self.param_groups for p in group["params"] if p.grad is not None):
            return False
        for group in self._own_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                self.state[p] = {"momentum_buffer": torch.zeros_like(p)} if group["momentum"] else {}
        self._step_rest()
        self.preconditioner.allocate()
        return True

    # -- state --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """SGD's state and a ``"preconditioner"`` entry keyed by module name.

        Taken between steps, it is everything needed to go on bit-identically. Hooks see the entry and can
        change it, and ``torch.distributed.checkpoint.state_dict`` brings it along (not flattened).
        """

        def add(_: Any, state: dict[str, Any]) -> None:
            generators = [generator.get_state() for generator in self._generators]
            state[ENTRY] = self.preconditioner.state_dict() | {"generators": generators}
            state[ENTRY] |= self._damping.state_dict()
            if self.rest is not None:
                state[ENTRY]["rest"] = name_of(self.rest)

        with self.register_state_dict_post_hook(add, prepend=True):  # ahead of hooks that want to see it
            return with_carrier(super().state_dict(), self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a ``state_dict`` of the same kind of optimizer on the same layers, on any device.

        Raises:
            ValueError: the state is another optimizer's or another model's.
        """
        entry: dict[str, Any] = {}

        def take(_: Any, state: dict[str, Any]) -> dict[str, Any]:
            nonlocal entry
            entry, rest = without_entry(state)
            check_same_rest(entry.get("rest"), self.rest)
            self.preconditioner.check_state_dict(entry)
            self._damping.check_state_dict(entry)
            return rest

        # After hooks that change what is loaded, and ahead of those that look at what was.
        before = self.register_load_state_dict_pre_hook(take)
        after = self.register_load_state_dict_post_hook(lambda _: self._load_entry(entry), prepend=True)
        with before, after:
            super().load_state_dict(state_dict)

    def _load_entry(self, entry: dict[str, Any]) -> None:
        self._share_with_rest()
        self.preconditioner.load_state_dict(entry)
        self._damping.load_state_dict(entry)
        self._capture.release()
        try:
            for generator, saved in zip(self._generators, entry["generators"], strict=True):
                generator.set_state(saved.cpu())
        except (RuntimeError, ValueError) as error:  # generators of another device or number
            warnings.warn(f"the label draws start anew from the given generator: {error}")

    def __getstate__(self) -> Any:
        raise TypeError("a K-FAC optimizer is bound to its model's hooks: copy or pickle its state_dict()")

    def __repr__(self) -> str:
        head = summary(self._entries, self.preconditioner.layers, self._plain(), self.preconditioner.memory())
        lines = "\n".join(f"    {line}" for line in self.coverage)
        return f"{head}\n{super().__repr__()}\nParameters:\n{lines}"
