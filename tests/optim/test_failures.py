"""Misuse is named with its remedy; numbers that are not finite never reach what is remembered."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac2 import KFAC, CoarseSpace, TwoLevelKFAC
from kfac2.nn import ReplicatedLinear
from kfac2.optim.first_order import SGD
from tests.optim.loop import (
    BATCH,
    CLASSES,
    FACTORS,
    INPUTS,
    INVERSES,
    REPLICAS,
    batch,
    build,
    each_inverse,
    each_optimizer,
    layer_of,
    network,
    replicated,
    same,
    seeds,
    train,
    train_replicas,
    values,
)

HEALTHY = [0, 2]


def step_with_labels(model: nn.Module, optimizer: KFAC, step: int, labels: Tensor | None) -> None:
    """The curvature's labels are given, so that only the curvature is spoiled where they are NaN."""
    x, _ = batch(step)
    optimizer.zero_grad()
    output = model(x)
    optimizer.update_curvature(output, labels=labels)
    output.square().mean().backward()
    optimizer.step()


def layers_of(optimizer: KFAC) -> Any:
    return copy.deepcopy(optimizer.state_dict()["preconditioner"]["layers"])


def nan_labels() -> Tensor:
    return torch.full((BATCH, CLASSES), torch.nan, dtype=torch.float64)


# -- wrappers ---------------------------------------------------------------------------------------


class DistributedDataParallel(nn.Module):
    """Has the name and the shape of torch's, which needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@each_optimizer
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, "DataParallel is not supported.*plain module.*DistributedDataParallel"),
        (DistributedDataParallel, "give K-FAC the plain module, not the DistributedDataParallel"),
    ],
    ids=["DataParallel", "DistributedDataParallel"],
)
def test_wrapped_models_are_refused(
    kind: type[KFAC], wrap: Callable[[nn.Module], nn.Module], message: str, nested: bool
) -> None:
    wrapped = wrap(network())
    with pytest.raises(ValueError, match=message):
        kind(nn.Sequential(wrapped, nn.Tanh()) if nested else wrapped)


def test_replicated_layers_must_agree() -> None:
    with pytest.raises(ValueError, match=r"one number of replicas, got \[2, 3\]"):
        KFAC(nn.Sequential(ReplicatedLinear(2, 4, 4), ReplicatedLinear(3, 4, 4)))
    with pytest.raises(ValueError, match="mix plain and replicated"):
        KFAC(nn.Sequential(ReplicatedLinear(1, 4, 4), nn.Linear(4, 4)))


# -- update_curvature -------------------------------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize("step", [0, FACTORS])
def test_forgetting_update_curvature(kind: type[KFAC], step: int) -> None:
    model = network()
    optimizer = build(kind, model)
    train(model, optimizer, step)
    x, y = batch(step)
    F.cross_entropy(model(x), y).backward()
    before = values(model)
    with pytest.raises(RuntimeError, match=rf"iteration {step + 1} .*optimizer.update_curvature\(output\)"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_update_curvature_may_be_left_out_where_nothing_is_due() -> None:
    model = network()
    optimizer = build(KFAC, model)
    train(model, optimizer, 1)
    F.cross_entropy(model(batch(1)[0]), batch(1)[1]).backward()
    optimizer.step()


FOREIGN_OUTPUTS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "another model's": (lambda model, x: network()(x), "model's latest forward pass"),
    "around the model": (lambda model, x: model.forward(x), "called through the model"),
    "no model's": (lambda model, x: x.requires_grad_()[:, :CLASSES], "model's latest forward pass"),
    "under no_grad": (lambda model, x: torch.no_grad()(model)(x), "with grad enabled"),
    "detached": (lambda model, x: model(x).detach(), "with grad enabled"),
}


@each_optimizer
@pytest.mark.parametrize("case", FOREIGN_OUTPUTS)
def test_an_output_of_no_forward_pass_of_the_model(kind: type[KFAC], case: str) -> None:
    model = network()
    optimizer = build(kind, model)
    make, message = FOREIGN_OUTPUTS[case]
    output = make(model, batch(0)[0])
    with pytest.raises(RuntimeError, match=message):
        optimizer.update_curvature(output)


def test_an_output_of_before_the_latest_step() -> None:
    model = network()
    optimizer = build(KFAC, model, factor_interval=1)
    old = model(batch(0)[0])
    train(model, optimizer, 1)
    with pytest.raises(RuntimeError, match=r"before the latest step.*detach what is carried over"):
        optimizer.update_curvature(old)


@pytest.mark.parametrize(
    ("likelihood", "shape", "expected"),
    [
        ("categorical", (BATCH, CLASSES), rf"\({BATCH},\)"),
        ("categorical", (BATCH - 1,), rf"\({BATCH},\)"),
        ("categorical", (BATCH, 1), rf"\({BATCH},\)"),
        ("bernoulli", (BATCH,), rf"\({BATCH}, {CLASSES}\)"),
        ("gaussian", (1, CLASSES), rf"\({BATCH}, {CLASSES}\)"),
    ],
)
def test_labels_of_a_wrong_shape(likelihood: str, shape: tuple[int, ...], expected: str) -> None:
    model = network()
    optimizer = build(TwoLevelKFAC, model, likelihood=likelihood)
    output = model(batch(0)[0])
    with pytest.raises(ValueError, match=rf"labels have shape .*{expected}"):
        optimizer.update_curvature(output, labels=torch.zeros(shape, dtype=torch.int64))


def test_a_refused_call_leaves_no_trace() -> None:
    model, twin = network(), network()
    optimizer = build(TwoLevelKFAC, model)
    with pytest.raises(ValueError, match="labels"):
        optimizer.update_curvature(model(batch(0)[0]), labels=torch.zeros(1))
    model.load_state_dict(network().state_dict())  # the batch norm has seen one batch more
    train(model, optimizer, 3)
    train(twin, build(TwoLevelKFAC, twin), 3)
    assert same(model, twin)


def test_outputs_of_a_wrong_shape() -> None:
    single = nn.Sequential(nn.Linear(INPUTS, 1), nn.Flatten(0)).double()
    with pytest.raises(ValueError, match=r"categorical.*class axis.*bernoulli"):
        build(KFAC, single).update_curvature(single(batch(0)[0]))
    model = replicated()
    output = model(torch.randn(REPLICAS, INPUTS, BATCH).double()).mT
    with pytest.raises(ValueError, match=rf"expected \({REPLICAS}, batch"):
        build(KFAC, model).update_curvature(output[0])


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_single_outputs_without_an_output_axis(likelihood: str) -> None:
    flat = nn.Sequential(nn.Linear(INPUTS, 1), nn.Flatten(0)).double()
    column = nn.Sequential(nn.Linear(INPUTS, 1)).double()
    column.load_state_dict(flat.state_dict())
    for model in (flat, column):
        optimizer = build(TwoLevelKFAC, model, likelihood=likelihood)
        for step in range(3):
            step_with_labels(model, optimizer, step, labels=None)
    assert same(flat, column)


class WithUnbatched(nn.Module):
    """A layer whose input has no batch axis feeds one that is fine."""

    def __init__(self, layer: nn.Module, inputs: Tensor) -> None:
        super().__init__()
        self.layer, self.inputs, self.last = layer, inputs, nn.Linear(INPUTS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.layer(self.inputs).mean())


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Linear(INPUTS, 2), (INPUTS,), r"\(batch, features\) or \(batch, positions, features\)"),
        (nn.Conv2d(1, 2, 3), (1, 5, 5), r"\(batch, channels, height, width\)"),
    ],
    ids=["linear", "convolution"],
)
def test_a_layer_without_a_batch_is_named_with_the_remedy(
    layer: nn.Module, shape: tuple[int, ...], expected: str
) -> None:
    model = WithUnbatched(layer, torch.randn(shape)).double()
    model.inputs = model.inputs.double()
    x = torch.randn(BATCH, INPUTS).double()
    with pytest.raises(
        ValueError, match=rf"'layer' got an input of shape .*only {expected}.*exclude=\['layer'\]"
    ):
        build(TwoLevelKFAC, model).update_curvature(model(x))
    build(TwoLevelKFAC, model, exclude=["layer"]).update_curvature(model(x))


# -- one replica that is not finite -----------------------------------------------------------------


@each_optimizer
@each_inverse
@pytest.mark.parametrize(
    ("what", "bad"), [("inputs", torch.nan), ("inputs", torch.inf), ("weights", torch.nan)]
)
@pytest.mark.parametrize("since", [0, FACTORS, INVERSES])
def test_a_bad_replica_never_touches_the_others(
    kind: type[KFAC], inverse: str, what: str, bad: float, since: int
) -> None:
    model, healthy = replicated(), replicated()
    optimizer = build(kind, model, inverse=inverse, generator=seeds())

    def spoil(step: int, x: Tensor) -> Tensor:
        if step == since and what == "weights":
            with torch.no_grad():
                next(model.parameters())[1] = bad
        if step >= since and what == "inputs":
            x[1] = bad
        return x

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_replicas(model, optimizer, 2 * INVERSES + 1, spoil=spoil)
    train_replicas(healthy, build(kind, healthy, inverse=inverse, generator=seeds()), 2 * INVERSES + 1)
    for p, q in zip(model.parameters(), healthy.parameters(), strict=True):
        assert torch.equal(p[HEALTHY], q[HEALTHY])
    assert [issubclass(w.category, RuntimeWarning) for w in caught] == [True]
    assert "not finite" in str(caught[0].message)
    assert optimizer.rejected_samples > 0
    assert optimizer.diverged.tolist() == [False, since == 0, False]
    for state in layers_of(optimizer).values():
        assert state["a"].isfinite().all()
        assert state["g"].isfinite().all()


def test_rejected_samples_are_counted_by_layer_and_replica() -> None:
    def spoil(step: int, x: Tensor) -> Tensor:
        return x.index_fill(0, torch.tensor(1), torch.nan)

    for kind, per_refresh in ((KFAC, 2), (TwoLevelKFAC, 3)):  # two layers, and the coarse space
        model = replicated()
        optimizer = build(kind, model, generator=seeds())
        with pytest.warns(RuntimeWarning):
            train_replicas(model, optimizer, 2 * FACTORS, spoil=spoil)
        assert optimizer.rejected_samples == 2 * per_refresh


# -- one refresh that is not finite -----------------------------------------------------------------


@each_optimizer
@each_inverse
def test_a_bad_refresh_leaves_factors_and_inverses(kind: type[KFAC], inverse: str) -> None:
    model = network()
    optimizer = build(kind, model, inverse=inverse, likelihood="gaussian")
    for step in range(INVERSES):
        step_with_labels(model, optimizer, step, labels=None)
    before, coarse = layers_of(optimizer), copy.deepcopy(optimizer.state_dict()["preconditioner"]["coarse"])
    with pytest.warns(RuntimeWarning, match=f"iteration {INVERSES + 1}.*not finite"):
        step_with_labels(model, optimizer, INVERSES, labels=nan_labels())
    for name, state in layers_of(optimizer).items():
        for key in ("a", "g", "seen"):
            assert torch.equal(state[key], before[name][key])
    if coarse is not None:
        assert torch.equal(optimizer.state_dict()["preconditioner"]["coarse"]["grams"], coarse["grams"])
    assert optimizer.rejected_samples == 3 + (kind is TwoLevelKFAC)
    assert optimizer.failed_inverses == 0
    assert all(p.isfinite().all() for p in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step_with_labels(model, optimizer, INVERSES + 1, labels=None)
        step_with_labels(model, optimizer, INVERSES + 2, labels=nan_labels())
    assert all(p.isfinite().all() for p in model.parameters())


@each_optimizer
@each_inverse
def test_a_bad_first_refresh_is_an_error_and_the_next_batch_heals(kind: type[KFAC], inverse: str) -> None:
    model, twin = network(), network()
    optimizer = build(kind, model, inverse=inverse, likelihood="gaussian")
    before = values(model)
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match=r"no finite curvature.*0, 3, 5"):
        step_with_labels(model, optimizer, 0, labels=nan_labels())
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    model.load_state_dict(network().state_dict())  # the batch norm has seen one batch more
    other = build(kind, twin, inverse=inverse, likelihood="gaussian")
    for one, its_optimizer in ((model, optimizer), (twin, other)):
        for step in range(INVERSES + 1):
            step_with_labels(one, its_optimizer, step, labels=None)
    assert same(model, twin)


@each_optimizer
def test_a_failed_eigendecomposition_keeps_the_inverse(
    kind: type[KFAC], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, eigh = network(), torch.linalg.eigh
    optimizer = build(kind, model)
    train(model, optimizer, INVERSES)
    before = layers_of(optimizer)

    def fails_on_four_by_four(x: Tensor) -> Any:
        if x.shape[-1] == 4:
            raise torch.linalg.LinAlgError("did not converge")  # pyright: ignore[reportPrivateImportUsage]
        return eigh(x)

    monkeypatch.setattr(torch.linalg, "eigh", fails_on_four_by_four)
    with pytest.warns(RuntimeWarning, match="2 inverses could not be computed"):
        train(model, optimizer, 1, first=INVERSES)
    after = layers_of(optimizer)
    kept = {
        name: torch.equal(after[name]["eigenvectors_a"], before[name]["eigenvectors_a"]) for name in after
    }
    assert kept == {"0": True, "3": True, "5": False}  # the output layer's G is 3 by 3
    assert optimizer.failed_inverses == 2
    assert all(p.isfinite().all() for p in model.parameters())


def fails(x: Tensor) -> Any:
    raise torch.linalg.LinAlgError("did not converge")  # pyright: ignore[reportPrivateImportUsage]


def test_without_any_inverse_the_step_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    model, plain = network(), network()
    optimizer = build(TwoLevelKFAC, model, kl_clip=None)
    message = r"4 inverses could not be computed.*layers 0, 3, 5 and the coarse matrix.*[Rr]aise damping"
    with pytest.warns(RuntimeWarning, match=message):
        train(model, optimizer, 1)
    train(plain, SGD(plain, lr=0.05, momentum=0.9, weight_decay=1e-3), 1)
    assert same(model, plain)
    assert optimizer.failed_inverses == 4
    assert not optimizer.diverged.any()


def test_a_failed_inverse_is_not_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    eigh = torch.linalg.eigh
    model = replicated()
    optimizer = build(KFAC, model, generator=seeds())

    def fails_in_one_replica(x: Tensor) -> Any:
        spoiled = optimizer.preconditioner.stacks[0].blocks.a[0, 1]
        if x.shape[-1] == len(spoiled) and (x == spoiled).all((-2, -1)).any():
            fails(x)
        return eigh(x)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_one_replica)
    with pytest.warns(RuntimeWarning, match=r"1 inverses .*\(layers 0 in replicas \[1\]\)"):
        train_replicas(model, optimizer, 1)
    assert not optimizer.diverged.any()
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.failures["failed_inverses"].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("what", "message"), [("batch", "parameters are finite: check the batch"), ("model", "a lower lr")]
)
def test_the_remedy_fits_what_is_not_finite(what: str, message: str) -> None:
    model = network()
    optimizer = build(KFAC, model, likelihood="gaussian")
    if what == "model":
        with torch.no_grad():
            layer_of(model, 3).weight[0, 0] = torch.nan
    labels = nan_labels() if what == "batch" else None
    with pytest.warns(RuntimeWarning, match=message), pytest.raises(RuntimeError, match=message):
        step_with_labels(model, optimizer, 0, labels=labels)
    assert optimizer.failed_inverses == 0


# -- degenerate curvature ---------------------------------------------------------------------------


@each_optimizer
@each_inverse
@pytest.mark.parametrize("zero", ["inputs", "gradients"])
def test_zero_factors_give_finite_steps(kind: type[KFAC], inverse: str, zero: str) -> None:
    model = nn.Sequential(nn.Linear(INPUTS, CLASSES, bias=False)).double()
    optimizer = build(kind, model, inverse=inverse, likelihood="gaussian")
    x = batch(0)[0] * (zero != "inputs")
    output = model(x)
    optimizer.update_curvature(output, labels=output.detach() if zero == "gradients" else None)
    output.square().mean().backward()
    before = layer_of(model, 0).weight.detach().clone()
    optimizer.step()
    after = layer_of(model, 0).weight
    assert after.isfinite().all()
    assert zero == "inputs" or not torch.equal(after, before)


@each_optimizer
@each_inverse
def test_without_damping_a_regular_block_trains(kind: type[KFAC], inverse: str) -> None:
    model = nn.Sequential(nn.Linear(INPUTS, CLASSES, bias=False)).double()
    optimizer = build(kind, model, inverse=inverse, likelihood="gaussian", damping=0.0)
    for step in range(3):
        step_with_labels(model, optimizer, step, labels=None)
    assert layer_of(model, 0).weight.isfinite().all()


@each_optimizer
@each_inverse
def test_without_damping_a_singular_block_is_an_error(kind: type[KFAC], inverse: str) -> None:
    model = nn.Sequential(nn.Linear(INPUTS, CLASSES, bias=False)).double()
    optimizer = build(kind, model, inverse=inverse, likelihood="gaussian", damping=0.0)
    output = model(torch.zeros(BATCH, INPUTS).double())
    optimizer.update_curvature(output)
    output.sum().backward()
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match=r"layers 0.*raise damping"):
        optimizer.step()


@each_optimizer
@each_inverse
def test_without_damping_one_singular_replica_leaves_the_others(kind: type[KFAC], inverse: str) -> None:
    def spoil(step: int, x: Tensor) -> Tensor:
        return x.index_fill(0, torch.tensor(1), 0.0)

    def model() -> nn.Module:
        layer = ReplicatedLinear(REPLICAS, INPUTS, CLASSES, generators=seeds())
        return nn.Sequential(layer).double()

    singular, healthy = model(), model()
    options: dict[str, Any] = {"inverse": inverse, "damping": 0.0, "likelihood": "gaussian"}
    with pytest.warns(RuntimeWarning):
        train_replicas(singular, build(kind, singular, **options, generator=seeds()), 3, spoil=spoil)
    train_replicas(healthy, build(kind, healthy, **options, generator=seeds()), 3)
    assert torch.equal(singular[0].weight[HEALTHY], healthy[0].weight[HEALTHY])  # pyright: ignore


@each_optimizer
def test_a_step_without_gradients_changes_nothing(kind: type[KFAC]) -> None:
    model = network()
    optimizer = build(kind, model)
    before = values(model)
    optimizer.update_curvature(model(batch(0)[0]))
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_one_coarse_space_serves_one_optimizer() -> None:
    coarse = CoarseSpace()
    TwoLevelKFAC(nn.Linear(3, 2), coarse=coarse)
    with pytest.raises(ValueError, match="belongs to another optimizer"):
        TwoLevelKFAC(nn.Linear(3, 2), coarse=coarse)


def test_a_coarse_space_and_its_options_are_not_both_given() -> None:
    with pytest.raises(ValueError, match="either `coarse` or coarse_fisher"):
        TwoLevelKFAC(nn.Linear(3, 2), coarse=CoarseSpace(), coarse_fisher="exact")


@pytest.mark.parametrize("kind", [KFAC, TwoLevelKFAC])
def test_a_layer_frozen_later_stays_although_its_gradient_is_zeroed(kind: type[KFAC]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = kind(model, 0.1, momentum=0.0, weight_decay=0.0, factor_interval=2, inverse_interval=2)
    x, y = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 0, 1])
    frozen = model[2]
    assert isinstance(frozen, nn.Linear)
    for step in range(6):
        if step == 3:
            frozen.requires_grad_(False)
            before = frozen.weight.detach().clone()
        optimizer.zero_grad(set_to_none=False)
        output = model(x)
        optimizer.update_curvature(output)
        nn.functional.cross_entropy(output, y).backward()
        optimizer.step()
    assert torch.equal(frozen.weight, before)


def test_a_batch_that_fails_half_way_does_not_count() -> None:
    model = WithUnbatched(nn.Linear(INPUTS, 2), torch.randn(INPUTS))
    optimizer = KFAC(model)
    output = model(torch.randn(BATCH, INPUTS))
    with pytest.raises(ValueError, match=r"exclude=\['layer'\]"):
        optimizer.update_curvature(output)
    with pytest.raises(RuntimeError, match=r"call optimizer\.update_curvature"):
        optimizer.step()
