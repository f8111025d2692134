"""The curvature is that of the loss which is minimised, whatever its reduction, weights and shapes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from kfac2 import KFAC
from kfac2.optim.losses import Loss, loss_of
from tests.optim import loop
from tests.optim.loop import REPLICAS, build, each_optimizer, layer_of, network, seeds, train

WEIGHT = torch.tensor([0.5, 2.0, 0.0]).double()
POSITIVE = torch.tensor([3.0, 0.2, 1.0]).double()
MASK = torch.tensor([True, False, True, True])


class Case(NamedTuple):
    likelihood: Any
    shape: tuple[int, ...]
    minimised: Callable[[Tensor, Tensor], Tensor] | None = None
    """Of outputs, their classes last, and targets; None is the module itself."""
    class_dim: int | None = None
    mask: Tensor | None = None

    @property
    def loss(self) -> Loss:
        return loss_of(self.likelihood, self.class_dim)

    def value(self, output: Tensor, targets: Tensor) -> Tensor:
        if self.minimised is not None:
            return self.minimised(output, targets)
        return self.likelihood(output.movedim(-1, 1) if self.loss.likelihood.has_classes else output, targets)


def masked_cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output[MASK].flatten(0, -2), y[MASK].flatten())


def masked_bits(output: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(output[MASK], y[MASK])


CASES = {
    "classes, name": Case("categorical", (4, 3), lambda o, y: F.cross_entropy(o, y)),
    "classes, mean": Case(nn.CrossEntropyLoss(), (4, 3)),
    "classes, sum": Case(nn.CrossEntropyLoss(reduction="sum"), (4, 3)),
    "smoothed": Case(nn.CrossEntropyLoss(label_smoothing=0.3), (4, 3)),
    "ignored": Case(nn.CrossEntropyLoss(ignore_index=1), (6, 3)),
    "ignored, sum": Case(nn.CrossEntropyLoss(ignore_index=1, reduction="sum"), (6, 3)),
    "weighted": Case(nn.CrossEntropyLoss(WEIGHT), (6, 3)),
    "weighted, sum": Case(nn.CrossEntropyLoss(WEIGHT, reduction="sum"), (6, 3)),
    "weighted, all": Case(nn.CrossEntropyLoss(WEIGHT, ignore_index=0, label_smoothing=0.3), (6, 3)),
    "tokens": Case(nn.CrossEntropyLoss(), (2, 4, 3), class_dim=-1),
    "tokens, name": Case(
        "categorical", (2, 4, 3), lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten()), class_dim=-1
    ),
    "tokens, weighted": Case(nn.CrossEntropyLoss(WEIGHT, ignore_index=2), (2, 4, 3), class_dim=-1),
    "tokens, masked": Case("categorical", (4, 2, 3), masked_cross_entropy, class_dim=-1, mask=MASK),
    "pixels": Case(nn.CrossEntropyLoss(), (2, 3, 2, 2), class_dim=1),
    "pixels, sum": Case(nn.CrossEntropyLoss(reduction="sum"), (2, 3, 2, 2), class_dim=1),
    "bit, name": Case("bernoulli", (4,), lambda o, y: F.binary_cross_entropy_with_logits(o, y)),
    "bits, name": Case("bernoulli", (4, 3), lambda o, y: 3 * F.binary_cross_entropy_with_logits(o, y)),
    "bits, mean": Case(nn.BCEWithLogitsLoss(), (4, 3)),
    "bits, sum": Case(nn.BCEWithLogitsLoss(reduction="sum"), (4, 3)),
    "bits, weight": Case(nn.BCEWithLogitsLoss(WEIGHT), (4, 3)),
    "bits, pos_weight": Case(nn.BCEWithLogitsLoss(pos_weight=POSITIVE), (4, 3)),
    "bits, both, sum": Case(nn.BCEWithLogitsLoss(WEIGHT, reduction="sum", pos_weight=POSITIVE), (4, 3)),
    "bits, maps": Case(nn.BCEWithLogitsLoss(), (2, 3, 2, 2)),
    "bits, name, masked": Case("bernoulli", (4, 3), lambda o, y: 3 * masked_bits(o, y), mask=MASK),
    "bits, mean, masked": Case(nn.BCEWithLogitsLoss(), (4, 3), masked_bits, mask=MASK),
    "means, name": Case("gaussian", (4, 3), lambda o, y: 0.5 * (o - y).square().sum(1).mean()),
    "means, mean": Case(nn.MSELoss(), (4, 3)),
    "means, sum": Case(nn.MSELoss(reduction="sum"), (4, 3)),
    "means, maps": Case(nn.MSELoss(), (2, 3, 2, 2)),
    "means, one output": Case(nn.MSELoss(), (4,)),
    "means, masked": Case(nn.MSELoss(), (4, 3), lambda o, y: F.mse_loss(o[MASK], y[MASK]), mask=MASK),
}


def outcomes(loss: Loss, output: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Labels, the same for all terms, and each term's probability of its label; classes last."""
    if loss.likelihood.has_classes:
        p = output.softmax(-1)
        return [(torch.full(p.shape[:-1], c), p[..., c]) for c in range(p.shape[-1])]
    if loss.likelihood is loss_of("bernoulli").likelihood:
        p = output.sigmoid()
        return [(torch.ones_like(p), p), (torch.zeros_like(p), 1 - p)]
    half = torch.full_like(output, 0.5)  # the two points have a Gaussian's mean and variance
    return [(output + 1, half), (output - 1, half)]


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_drawn_labels_have_the_losses_hessian_as_covariance(name: str) -> None:
    """All labels are enumerated; the Hessian w.r.t. the outputs is autograd's, of torch's loss."""
    case, generator = CASES[name], torch.Generator().manual_seed(0)
    loss = case.loss
    output = torch.randn(case.shape, generator=generator, dtype=torch.float64)
    last = output if case.class_dim is None else output.movedim(case.class_dim, -1)
    if loss.likelihood.has_classes:
        targets = torch.randint(3, last.shape[:-1], generator=generator)
    else:
        targets = torch.rand(last.shape, generator=generator, dtype=torch.float64)
    hessian: Any = torch.autograd.functional.hessian(lambda o: case.value(o, targets), last)

    covariance = torch.zeros(())
    for labels, probability in outcomes(loss, last):
        leaf = output.clone().requires_grad_()
        sampled = loss.sample(leaf, [], labels, targets, case.mask)
        (g,) = torch.autograd.grad(sampled, leaf)
        g = g if case.class_dim is None else g.movedim(case.class_dim, -1)
        rows = g.reshape(probability.numel(), -1)
        covariance = covariance + probability.reshape(-1, 1, 1) * rows[:, :, None] * rows[:, None, :]
    expected = hessian.reshape(output.numel(), output.numel())
    assert_close(torch.block_diag(*covariance) / len(output), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["classes, mean", "weighted, all", "bits, both, sum", "means, masked"])
def test_a_replicas_sampled_loss_is_its_own(name: str) -> None:
    """Each replica's N counts its own labels."""
    case = CASES[name]
    loss, generator = case.loss, torch.Generator().manual_seed(0)
    output = torch.randn(REPLICAS, *case.shape, generator=generator, dtype=torch.float64)
    shape = output.shape[:-1] if loss.likelihood.has_classes else output.shape
    targets = torch.randint(2, shape, generator=generator)
    mask = None if case.mask is None else torch.rand(shape[:2], generator=generator) < 0.5
    together = output.clone().requires_grad_()
    sampled = loss._replace(replicas=REPLICAS).sample(together, seeds(), None, targets, mask)
    (expected,) = torch.autograd.grad(sampled, together)
    for r, seed in enumerate(seeds()):
        alone = output[r].clone().requires_grad_()
        sampled = loss.sample(alone, [seed], None, targets[r], None if mask is None else mask[r])
        assert_close(torch.autograd.grad(sampled, alone)[0], expected[r], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("outputs", [1, 10])
@pytest.mark.parametrize("shape", [(12,), (6, 2)], ids=["samples", "positions"])
def test_one_step_on_a_quadratic_loss_is_newtons(
    reduction: str, outputs: int, shape: tuple[int, ...]
) -> None:
    criterion, generator = nn.MSELoss(reduction=reduction), torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, outputs, bias=False)).double()
    optimum = torch.randn(outputs, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
    optimizer = KFAC(
        model, 1.0, momentum=0, weight_decay=0, damping=1e-13, kl_clip=None, likelihood=criterion
    )
    output = model(x)
    # Draws with the mean and covariance of a unit Gaussian, so that no number of samples is needed.
    rows = torch.randn(12, outputs, generator=generator, dtype=torch.float64)
    noise = torch.linalg.qr(rows).Q * 12**0.5
    optimizer.update_curvature(output, labels=output.detach() + noise.reshape(output.shape))
    criterion(output, x @ optimum.T).backward()
    optimizer.step()
    assert_close(layer_of(model, 0).weight.detach(), optimum, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.MSELoss(reduction="sum")], ids=["mean", "sum"])
def test_one_step_with_drawn_labels_is_nearly_newtons(criterion: nn.MSELoss) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10, bias=False)).double()
    start, optimum = (
        layer_of(model, 0).weight.detach().clone(),
        torch.randn(10, 6, generator=generator).double(),
    )
    x = torch.randn(4096, 6, generator=generator).double()
    options = {"momentum": 0, "weight_decay": 0, "damping": 1e-6, "kl_clip": None, "generator": generator}
    optimizer = KFAC(model, 1.0, likelihood=criterion, **options)
    output = model(x)
    optimizer.update_curvature(output)
    criterion(output, x @ optimum.T).backward()
    optimizer.step()
    way = optimum - start
    assert ((layer_of(model, 0).weight.detach() - start) * way).sum() / way.square().sum() == pytest.approx(
        1, abs=0.1
    )


def test_given_labels_that_are_ignored_are_masked() -> None:
    output = torch.randn(4, 3).double()
    labels = torch.tensor([0, -100, 2, -100])
    assert_gradients_agree("categorical", output, labels, None, labels.clamp(min=0), labels >= 0)
    values = torch.tensor([0.5, torch.nan, 2.0, torch.nan]).double()[:, None].expand(-1, 3)
    mask = values[:, 0].isfinite()
    assert_gradients_agree("gaussian", output, values, mask, values.nan_to_num(), mask)


def assert_gradients_agree(
    likelihood: str, output: Tensor, labels: Tensor, mask: Tensor | None, others: Tensor, other: Tensor
) -> None:
    gradients = []
    for given, counts in ((labels, mask), (others, other)):
        leaf = output.clone().requires_grad_()
        sampled = loss_of(likelihood).sample(leaf, [], given, mask=counts)
        gradients.append(torch.autograd.grad(sampled, leaf)[0])
    assert gradients[0].isfinite().all()
    assert not gradients[0][1].any()
    assert_close(*gradients, rtol=0, atol=0)


def test_a_batch_in_which_nothing_counts_is_no_curvature() -> None:
    output = torch.randn(4, 3, requires_grad=True)
    sampled = loss_of("categorical").sample(
        output, [torch.Generator()], mask=torch.zeros(4, dtype=torch.bool)
    )
    (g,) = torch.autograd.grad(sampled, output)
    assert not g.any()


@each_optimizer
@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_a_mean_cross_entropy_is_the_categorical_likelihood(kind: type[KFAC], criterion: nn.Module) -> None:
    named, given = network(), network()
    train(named, build(kind, named), 5)
    train(given, build(kind, given, likelihood=criterion), 5)
    loop.assert_close(named, given, rtol=0, atol=0)
