"""What we are compared with: plain PyTorch, and K-FAC optimizers that install from PyPI.

All train one seed of the same network, written as anybody would, with ``nn.Linear`` and ``nn.BatchNorm1d``.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import FACTOR_INTERVAL, INVERSE_INTERVAL, Contender
from experiments.problems.deep_linear import DeepLinearMLP

SGD_OPTIONS: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-3}


def plain_sgd(batch_size: int) -> Contender:
    model, batches = _network(), _batches(batch_size)
    optimizer = torch.optim.SGD(model.parameters(), **SGD_OPTIONS)

    def step(t: int) -> None:
        x, y = batches[t % len(batches)]
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(x), y).backward()
        optimizer.step()

    return Contender("plain nn.Sequential, SGD", step)


def asdl_kfac(batch_size: int) -> Contender:
    """K-FAC of ``asdfghjkl``: one Monte Carlo sample of the true Fisher, factored Tikhonov damping."""
    from asdl.precondition import (  # pyright: ignore[reportMissingImports]
        KfacGradientMaker,
        PreconditioningConfig,
    )

    model, batches = _network(), _batches(batch_size)
    optimizer = torch.optim.SGD(model.parameters(), **SGD_OPTIONS)
    config = PreconditioningConfig(
        data_size=batch_size,
        damping=1e-2,
        ema_decay=0.05,
        curvature_upd_interval=FACTOR_INTERVAL,
        preconditioner_upd_interval=INVERSE_INTERVAL,
        ignore_modules=[nn.BatchNorm1d],
    )
    maker = KfacGradientMaker(model, config, fisher_type="fisher_mc", loss_type="cross_entropy")

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        """Two classes' logits for the Fisher's draws (a softmax over one logit is constant), and the logit."""
        logit = model(x)
        return F.pad(logit, (1, 0)), logit

    def step(t: int) -> None:
        x, y = batches[t % len(batches)]
        optimizer.zero_grad()
        output = maker.setup_model_call(both, x)
        maker.setup_loss_call(F.binary_cross_entropy_with_logits, output[1], y)
        maker.forward_and_backward()
        optimizer.step()

    return Contender(
        f"asdfghjkl {version('asdfghjkl')}, true Fisher", step, 1, FACTOR_INTERVAL, INVERSE_INTERVAL
    )


def singd(batch_size: int) -> Contender:
    """``singd`` as IKFAC, its K-FAC-like form: empirical Fisher, no inverses; batch norms by SGD."""
    from singd.optim.optimizer import SINGD  # pyright: ignore[reportMissingImports]

    model, batches = _network(), _batches(batch_size)
    preconditioner = SINGD(
        model,
        **SGD_OPTIONS,
        damping=1e-2,
        T=FACTOR_INTERVAL,
        lr_cov=1e-2,
        alpha1=0.0,
        kfac_like=True,
        normalize_lr_cov=True,
        warn_unsupported=False,
    )
    norms = [p for module in model if isinstance(module, nn.BatchNorm1d) for p in module.parameters()]
    optimizer = torch.optim.SGD(norms, **SGD_OPTIONS)

    def step(t: int) -> None:
        x, y = batches[t % len(batches)]
        model.zero_grad()
        F.binary_cross_entropy_with_logits(model(x), y).backward()
        preconditioner.step()
        optimizer.step()

    return Contender(f"singd {version('singd')}, empirical Fisher", step, 1, FACTOR_INTERVAL)


PEERS: dict[str, Callable[[int], Contender]] = {"asdfghjkl": asdl_kfac, "singd": singd}


def available_peers(batch_size: int) -> list[Contender]:
    """Those that import and train here; says which do not, and why."""
    contenders = []
    for name, build in PEERS.items():
        try:
            contender = build(batch_size)
            contender.run(INVERSE_INTERVAL)
        except Exception as error:
            print(f"{name} skipped: {error!r}\n")
            continue
        contenders.append(contender)
    return contenders


def _network() -> nn.Sequential:
    modules: list[nn.Module] = []
    for _ in range(64):
        modules += [nn.Linear(10, 10, bias=False), nn.BatchNorm1d(10)]
    return nn.Sequential(*modules, nn.Linear(10, 1, bias=False))


def _batches(batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """One epoch of seed 0, a row per sample."""
    batches = DeepLinearMLP(seeds=[0]).train_batches(batch_size)
    return [(x[0].T.contiguous(), y[0][:, None]) for x, y in batches if y.shape[-1] == batch_size]
