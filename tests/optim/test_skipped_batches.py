"""Which batches count at a refresh: those whose gradients the step uses, whatever the order of a loop's calls."""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac2 import KFAC, TwoLevelKFAC
from tests.optim.loop import BATCH, CLASSES, INPUTS, batch, build, each_optimizer, network, replicated, same

Loss = Callable[[nn.Module, KFAC, int], Tensor]
GOOD, SKIPPED = (0, 2, 3, 5), (1, 4)


def model_of(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Without a batch norm, which sees skipped batches too."""
    return network(dtype=dtype)[2:]


def built(kind: type[KFAC], model: nn.Module, **options: Any) -> KFAC:
    return build(kind, model, **({"factor_interval": 1, "inverse_interval": 1} | options))


def observed_loss(model: nn.Module, optimizer: KFAC, step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The forward pass of a step, and ``update_curvature`` with its labels given."""
    x, y = batch(step, dtype)
    output = model(x)
    optimizer.update_curvature(output, labels=y)
    return F.cross_entropy(output, y)


# One iteration of a loop; a skipped one ends early, where such loops do.


def before_backward(model: nn.Module, optimizer: KFAC, step: int, skip: bool) -> None:
    optimizer.zero_grad()
    loss = observed_loss(model, optimizer, step)
    if skip:
        return
    loss.backward()
    optimizer.step()


def before_step(model: nn.Module, optimizer: KFAC, step: int, skip: bool) -> None:
    optimizer.zero_grad()
    observed_loss(model, optimizer, step).backward()
    if not skip:
        optimizer.step()


def zeroed_to_zero(model: nn.Module, optimizer: KFAC, step: int, skip: bool) -> None:
    optimizer.zero_grad(set_to_none=False)
    observed_loss(model, optimizer, step).backward()
    if not skip:
        optimizer.step()


def zeroed_by_the_model(model: nn.Module, optimizer: KFAC, step: int, skip: bool) -> None:
    model.zero_grad()
    observed_loss(model, optimizer, step).backward()
    if not skip:
        optimizer.step()


def zeroed_late_before_it(model: nn.Module, optimizer: KFAC, step: int, skip: bool) -> None:
    loss = observed_loss(model, optimizer, step)
    if skip:
        return
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def zeroed_late_after_it(model: nn.Module, optimizer: KFAC, step: int, skip: bool) -> None:
    loss = observed_loss(model, optimizer, step)
    optimizer.zero_grad()
    if skip:
        return
    loss.backward()
    optimizer.step()


def zeroed_late_before_step(model: nn.Module, optimizer: KFAC, step: int, skip: bool) -> None:
    loss = observed_loss(model, optimizer, step)
    optimizer.zero_grad()
    loss.backward()
    if not skip:
        optimizer.step()


def zeroed_at_the_end(model: nn.Module, optimizer: KFAC, step: int, skip: bool) -> None:
    observed_loss(model, optimizer, step).backward()
    if not skip:
        optimizer.step()
    optimizer.zero_grad()


def in_a_closure(model: nn.Module, optimizer: KFAC, step: int, skip: bool) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = observed_loss(model, optimizer, step)
        loss.backward()
        return loss

    if skip:
        closure()
    else:
        optimizer.step(closure)


def two_micro_batches(model: nn.Module, optimizer: KFAC, step: int, skip: bool) -> None:
    optimizer.zero_grad()
    for part in (step, 10 + step):
        observed_loss(model, optimizer, part).backward()
        if skip:
            return
    optimizer.step()


def micro_batches_zeroed_late(model: nn.Module, optimizer: KFAC, step: int, skip: bool) -> None:
    losses = [observed_loss(model, optimizer, part) for part in (step, 10 + step)]
    if skip:
        return
    optimizer.zero_grad()
    torch.stack(losses).sum().backward()
    optimizer.step()


def curvature_of_its_own_pass(model: nn.Module, optimizer: KFAC, step: int, skip: bool) -> None:
    """The training loss is not of the pass that was observed."""
    observed_loss(model, optimizer, step)
    optimizer.zero_grad()
    x, y = batch(step)
    F.cross_entropy(model(x), y).backward()
    if not skip:
        optimizer.step()


def of_a_derived_output(model: nn.Module, optimizer: KFAC, step: int, skip: bool) -> None:
    """The training loss does not depend on the tensor that ``update_curvature`` saw, but on what it is made of."""
    optimizer.zero_grad()
    x, y = batch(step)
    output = model(x)
    optimizer.update_curvature(2 * output, labels=y)
    F.cross_entropy(output, y).backward()
    if not skip:
        optimizer.step()


ITERATIONS = [
    before_backward,
    before_step,
    zeroed_to_zero,
    zeroed_by_the_model,
    zeroed_late_before_it,
    zeroed_late_after_it,
    zeroed_late_before_step,
    zeroed_at_the_end,
    in_a_closure,
    two_micro_batches,
    micro_batches_zeroed_late,
    curvature_of_its_own_pass,
    of_a_derived_output,
]


def remembered(optimizer: KFAC) -> dict[Any, Any]:
    state = optimizer.state_dict()["preconditioner"]
    tensors: dict[Any, Any] = {
        (name, key): x for name, layer in state["layers"].items() for key, x in layer.items()
    }
    return tensors | (state["coarse"] or {})


@each_optimizer
@pytest.mark.parametrize("iteration", ITERATIONS, ids=lambda f: f.__name__)
def test_a_skipped_iteration_leaves_no_trace(kind: type[KFAC], iteration: Callable[..., None]) -> None:
    model, twin = model_of(), model_of()
    optimizer, its_optimizer = built(kind, model), built(kind, twin)
    for step in sorted((*GOOD, *SKIPPED)):
        iteration(model, optimizer, step, skip=step in SKIPPED)
    for step in GOOD:
        iteration(twin, its_optimizer, step, skip=False)
    assert same(model, twin)
    kept = remembered(its_optimizer)
    for key, value in remembered(optimizer).items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(kept[key])), key


@each_optimizer
@pytest.mark.parametrize(
    "iteration", [two_micro_batches, micro_batches_zeroed_late], ids=lambda f: f.__name__
)
def test_micro_batches_add_up_in_either_order(kind: type[KFAC], iteration: Callable[..., None]) -> None:
    model, twin = model_of(), model_of()
    optimizer, its_optimizer = built(kind, model), built(kind, twin)
    for step in range(4):
        iteration(model, optimizer, step, skip=False)
        data = [batch(step), batch(10 + step)]
        its_optimizer.zero_grad()
        y = torch.cat([one[1] for one in data])
        output = twin(torch.cat([one[0] for one in data]))
        its_optimizer.update_curvature(output, labels=y)
        (2 * F.cross_entropy(output, y)).backward()
        its_optimizer.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("iteration", ITERATIONS, ids=lambda f: f.__name__)
def test_skipping_for_long_holds_few_samples(iteration: Callable[..., None]) -> None:
    model = model_of()
    optimizer = built(KFAC, model)
    for step in range(12):
        iteration(model, optimizer, step, skip=True)
    assert len(optimizer.preconditioner._observations._waiting) <= 4


@each_optimizer
def test_a_gradient_scaler_that_skips_a_step(kind: type[KFAC]) -> None:
    single = partial(model_of, torch.float32)
    model, twin = single(), single()
    optimizer, its_optimizer = built(kind, model), built(kind, twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)  # pyright: ignore[reportPrivateImportUsage]
    for step in range(6):
        optimizer.zero_grad()
        loss = observed_loss(model, optimizer, step, torch.float32)
        (scaler.scale(loss) * (torch.inf if step in SKIPPED else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update(2.0)
    for step in GOOD:
        its_optimizer.zero_grad()
        observed_loss(twin, its_optimizer, step, torch.float32).backward()
        its_optimizer.step()
    assert same(model, twin)


def test_two_optimizers_on_one_graph_in_the_late_order() -> None:
    """The sampled loss of the one is not the training loss of the other."""
    model = model_of()
    both = [
        built(KFAC, model, exclude=[other], params=model.get_submodule(own).parameters())
        for own, other in (("3", "5"), ("5", "3"))
    ]
    for step in range(3):
        x, y = batch(step)
        output = model(x)
        for optimizer in both:
            optimizer.update_curvature(output, labels=y)
        for optimizer in both:
            optimizer.zero_grad()
        F.cross_entropy(output, y).backward()
        for optimizer in both:
            optimizer.step()


@each_optimizer
def test_update_curvature_is_asked_for_after_a_skipped_iteration(kind: type[KFAC]) -> None:
    model = model_of()
    optimizer = built(kind, model)
    before_step(model, optimizer, 0, skip=True)
    optimizer.zero_grad()
    x, y = batch(1)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"call optimizer\.update_curvature"):
        optimizer.step()


# -- batches that are not finite, or empty ----------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_micro_batch_is_rejected_alone(kind: type[KFAC], first: bool) -> None:
    model, twin = model_of(), model_of()
    optimizer, its_optimizer = built(kind, model), built(kind, twin)
    x, y = batch(0)
    order = (torch.nan, 1.0) if first else (1.0, torch.nan)
    for factor in order:
        optimizer.update_curvature(model(factor * x), labels=y)
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    its_optimizer.update_curvature(twin(x), labels=y)
    its_optimizer.step()
    assert optimizer.rejected_samples == 2 + (kind is TwoLevelKFAC)
    assert its_optimizer.rejected_samples == 0
    kept = remembered(its_optimizer)
    for key, value in remembered(optimizer).items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(kept[key])), key


@each_optimizer
def test_a_bad_micro_batch_of_one_replica_is_rejected_alone(kind: type[KFAC]) -> None:
    model, twin = replicated(), replicated()
    optimizer, its_optimizer = built(kind, model), built(kind, twin)
    x = torch.randn(2, 3, INPUTS, BATCH).double()
    y = torch.randint(CLASSES, (2, 3, BATCH))
    bad = x.clone()
    bad[0, 1] = torch.inf
    for inputs, one, its in ((bad, optimizer, model), (x, its_optimizer, twin)):
        for part in (0, 1):
            one.update_curvature(its(inputs[part]).mT, labels=y[part])
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    its_optimizer.step()
    assert optimizer.rejected_samples == 2 + (kind is TwoLevelKFAC)
    its = replicated()
    alone = built(kind, its)
    alone.update_curvature(its(x[1]).mT, labels=y[1])
    alone.step()
    for key, value in remembered(optimizer).items():
        if isinstance(key, tuple) and key[1] in ("a", "g"):
            assert torch.equal(value[[0, 2]], remembered(its_optimizer)[key][[0, 2]])
            torch.testing.assert_close(value[1], remembered(alone)[key][1], rtol=1e-12, atol=1e-12)
    if kind is TwoLevelKFAC:
        grams = remembered(optimizer)["grams"]
        assert torch.equal(grams[:, [0, 2]], remembered(its_optimizer)["grams"][:, [0, 2]])
        torch.testing.assert_close(grams[:, 1], remembered(alone)["grams"][:, 1], rtol=1e-12, atol=1e-12)


@each_optimizer
@pytest.mark.parametrize("since", [0, 2])
def test_a_bad_batch_that_is_skipped_is_not_counted(kind: type[KFAC], since: int) -> None:
    model, twin = model_of(), model_of()
    optimizer, its_optimizer = built(kind, model), built(kind, twin)
    for step in range(4):
        if step == since:
            x, y = batch(9)
            optimizer.zero_grad()
            optimizer.update_curvature(model(x * torch.nan), labels=y)
        before_backward(model, optimizer, step, skip=False)
        before_backward(twin, its_optimizer, step, skip=False)
    assert optimizer.rejected_samples == 0
    assert same(model, twin)


def empty() -> tuple[Tensor, Tensor]:
    return torch.zeros(0, INPUTS).double(), torch.zeros(0, dtype=torch.long)


@each_optimizer
def test_an_empty_micro_batch_changes_nothing(kind: type[KFAC]) -> None:
    model, twin = model_of(), model_of()
    optimizer, its_optimizer = built(kind, model), built(kind, twin)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.update_curvature(model(empty()[0]))
        observed_loss(model, optimizer, step).backward()
        optimizer.step()
        before_backward(twin, its_optimizer, step, skip=False)
    assert same(model, twin)


@each_optimizer
@pytest.mark.parametrize("since", [0, 2])
def test_an_empty_batch_leaves_the_curvature_as_it_was(kind: type[KFAC], since: int) -> None:
    model = model_of()
    optimizer = built(kind, model)
    for step in range(since):
        before_backward(model, optimizer, step, skip=False)
    before = copy.deepcopy(remembered(optimizer))
    x, y = empty()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.zero_grad()
        output = model(x)
        optimizer.update_curvature(output)
        F.cross_entropy(output, y, reduction="sum").backward()
        optimizer.step()
    for key, value in remembered(optimizer).items():
        if isinstance(key, tuple) and key[1] in ("a", "g"):
            assert torch.equal(value, before[key])
    before_backward(model, optimizer, 7, skip=False)
    assert optimizer.rejected_samples == optimizer.failed_inverses == 0
    assert all(p.isfinite().all() for p in model.parameters())
