"""What we are compared with: plain PyTorch, and second-order optimizers that install from PyPI.

All train a network as anybody would write it, on batches drawn beforehand.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import FACTOR_INTERVAL, INVERSE_INTERVAL, Contender
from experiments.problems.deep_linear import DeepLinearMLP

SGD_OPTIONS: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-3}
NORMS = (nn.BatchNorm1d, nn.LayerNorm)


class Task(NamedTuple):
    """A network to train, and how often its curvature is refreshed while steps are sampled."""

    build: Callable[[], nn.Module]
    batches: Sequence[tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    class_logits: Callable[[Tensor], Tensor]
    """The rows ``(N, classes)`` from which the Fisher's labels are drawn, of an output."""
    loss_average: str = "batch"
    """``singd``'s name for what the loss is a mean over."""
    factor_interval: int = FACTOR_INTERVAL
    inverse_interval: int = INVERSE_INTERVAL

    def contender(self, name: str, optimizer_of: Callable[[nn.Module], Any], **intervals: Any) -> Contender:
        """The usual loop; an optimizer that observes the curvature has one call more."""
        model = self.build()
        optimizer = optimizer_of(model)
        observe = getattr(optimizer, "update_curvature", lambda output, targets: None)

        def step(t: int) -> None:
            x, y = self.batches[t % len(self.batches)]
            optimizer.zero_grad()
            output = model(x)
            observe(output, targets=y)
            self.loss(output, y).backward()
            optimizer.step()

        return Contender(name, step, **intervals)


def plain_sgd(task: Task) -> Contender:
    return task.contender(
        "plain nn.Sequential, SGD", lambda model: torch.optim.SGD(model.parameters(), **SGD_OPTIONS)
    )


def asdl_kfac(task: Task) -> Contender:
    """K-FAC of ``asdfghjkl``: one Monte Carlo sample of the true Fisher, factored Tikhonov damping."""
    from asdl.precondition import (  # pyright: ignore[reportMissingImports]
        KfacGradientMaker,
        PreconditioningConfig,
    )

    model, batches = task.build(), task.batches
    optimizer = torch.optim.SGD(model.parameters(), **SGD_OPTIONS)
    config = PreconditioningConfig(
        data_size=len(task.class_logits(model(batches[0][0]))),
        damping=1e-2,
        ema_decay=0.05,
        curvature_upd_interval=task.factor_interval,
        preconditioner_upd_interval=task.inverse_interval,
        ignore_modules=[*NORMS, nn.Embedding],
    )
    maker = KfacGradientMaker(model, config, fisher_type="fisher_mc", loss_type="cross_entropy")

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        output = model(x)
        return task.class_logits(output), output

    def step(t: int) -> None:
        x, y = batches[t % len(batches)]
        optimizer.zero_grad()
        output = maker.setup_model_call(both, x)
        maker.setup_loss_call(task.loss, output[1], y)
        maker.forward_and_backward()
        optimizer.step()

    name = f"asdfghjkl {version('asdfghjkl')}, true Fisher"
    return Contender(name, step, factor_interval=task.factor_interval, inverse_interval=task.inverse_interval)


def singd(task: Task) -> Contender:
    """``singd`` as IKFAC, its K-FAC-like form: empirical Fisher, no inverses; what it leaves, by SGD."""
    from singd.optim.optimizer import SINGD  # pyright: ignore[reportMissingImports]

    def both(model: nn.Module) -> "_Together":
        preconditioner = SINGD(
            model,
            **SGD_OPTIONS,
            damping=1e-2,
            T=task.factor_interval,
            loss_average=task.loss_average,
            lr_cov=1e-2,
            alpha1=0.0,
            kfac_like=True,
            normalize_lr_cov=True,
            warn_unsupported=False,
        )
        taken = {p for group in preconditioner.param_groups for p in group["params"]}
        rest = [p for p in model.parameters() if p not in taken]
        return _Together(preconditioner, torch.optim.SGD(rest, **SGD_OPTIONS))

    name = f"singd {version('singd')}, empirical Fisher"
    return task.contender(name, both, factor_interval=task.factor_interval)


class _Together:
    """Optimizers of different parameters, as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self._optimizers = optimizers

    def zero_grad(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step()


def soap(task: Task) -> Contender:
    """SOAP of ``pytorch_optimizer``: statistics in every step; its eigenbases come with our factors."""
    from pytorch_optimizer import SOAP  # pyright: ignore[reportMissingImports]

    def of(model: nn.Module) -> Any:
        return SOAP(model.parameters(), lr=1e-3, precondition_frequency=task.factor_interval)

    name = f"SOAP, pytorch_optimizer {version('pytorch_optimizer')}"
    return task.contender(name, of, factor_interval=task.factor_interval)


def shampoo(task: Task) -> Contender:
    """Shampoo of the same package: statistics in every step; its roots come with our inverses."""
    from pytorch_optimizer import Shampoo  # pyright: ignore[reportMissingImports]

    def of(model: nn.Module) -> Any:
        return Shampoo(model.parameters(), lr=1e-3, preconditioning_compute_steps=task.inverse_interval)

    name = f"Shampoo, pytorch_optimizer {version('pytorch_optimizer')}"
    # It counts its steps from one.
    return task.contender(name, of, inverse_interval=task.inverse_interval, iteration=1)


Maker = Callable[[], Contender]
KFAC_PEERS: dict[str, Callable[[Task], Contender]] = {"asdfghjkl": asdl_kfac, "singd": singd}
PEERS = KFAC_PEERS | {"SOAP": soap, "Shampoo": shampoo}


def available(makers: Mapping[str, Maker], steps: int) -> list[tuple[Maker, Contender]]:
    """Those whose loop can be made here and trains ``steps``; says which cannot, and why."""
    found = []
    for name, make in makers.items():
        try:
            contender = make()
            contender.run(steps)
        except Exception as error:
            print(f"{name} skipped: {error!r}\n")
            continue
        found.append((make, contender))
    return found


def deep_linear_task(batch_size: int) -> Task:
    """One seed of the deep linear MLP, with ``nn.Linear`` and ``nn.BatchNorm1d``; one epoch of seed 0."""
    batches = DeepLinearMLP(seeds=[0]).train_batches(batch_size)
    return Task(
        _network,
        [(x[0].T.contiguous(), y[0][:, None]) for x, y in batches if y.shape[-1] == batch_size],
        F.binary_cross_entropy_with_logits,
        # Two classes' logits: a softmax over one is constant.
        class_logits=partial(F.pad, pad=(1, 0)),
    )


def _network() -> nn.Sequential:
    modules: list[nn.Module] = []
    for _ in range(64):
        modules += [nn.Linear(10, 10, bias=False), nn.BatchNorm1d(10)]
    return nn.Sequential(*modules, nn.Linear(10, 1, bias=False))
