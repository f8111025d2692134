"""Labels follow the model's predictive distribution; losses are torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kfac2.optim.likelihood import LIKELIHOODS

DRAWS, REPLICAS = 40_000, 2
each_type = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def seeds(first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + r) for r in range(REPLICAS)]


def repeated(outputs: list, dtype: torch.dtype) -> Tensor:
    """One sample's outputs, different in each replica, ``DRAWS`` times."""
    return (
        torch.tensor(outputs).to(dtype)[:, None].expand(-1, DRAWS, *[-1] * (torch.tensor(outputs).dim() - 1))
    )


def assert_frequency(drawn: Tensor, probability: Tensor, deviations: float = 4) -> None:
    """Within some standard deviations (seeds are fixed, so this never flickers)."""
    deviation = (probability * (1 - probability) / DRAWS).sqrt()
    assert ((drawn - probability).abs() <= deviations * deviation + 1e-6).all()


@each_type
def test_categorical_frequencies(dtype: torch.dtype) -> None:
    output = repeated([[0.0, 1.0, -2.0, 3.0], [5.0, 5.0, -30.0, 5.0]], dtype)
    labels = LIKELIHOODS["categorical"].draw(output, seeds())
    assert labels.shape == (REPLICAS, DRAWS)
    assert labels.dtype == torch.int64
    assert_frequency(F.one_hot(labels, 4).double().mean(1), output[:, 0].double().softmax(-1))


@each_type
def test_many_classes(dtype: torch.dtype) -> None:
    """The cumulative distribution has steps of 1/300; bfloat16 near 1 has steps of 1/256."""
    output = repeated([[0.0] * 300, [1.0] * 300], dtype)
    labels = LIKELIHOODS["categorical"].draw(output, seeds())
    drawn = F.one_hot(labels, 300).double().mean(1)
    assert_frequency(drawn, torch.full_like(drawn, 1 / 300), deviations=5.5)


@each_type
def test_bernoulli_frequencies(dtype: torch.dtype) -> None:
    output = repeated([[-3.0, 0.0], [1.0, 40.0]], dtype)
    labels = LIKELIHOODS["bernoulli"].draw(output, seeds())
    assert labels.shape == output.shape
    assert set(labels.unique().tolist()) == {0.0, 1.0}
    drawn, probability = labels.double().mean(1), output[:, 0].double().sigmoid()
    assert_frequency(drawn, probability)


@each_type
def test_gaussian_moments(dtype: torch.dtype) -> None:
    output = repeated([[-3.0, 0.0], [1.0, 1000.0]], dtype)
    noise = (LIKELIHOODS["gaussian"].draw(output, seeds()) - output).double()
    spread = 4 / DRAWS**0.5
    assert (noise.mean(1).abs() < spread).all()
    assert ((noise.square().mean(1) - 1).abs() < 2**0.5 * spread).all()
    assert ((noise.pow(4).mean(1) - 3).abs() < 96**0.5 * spread + 0.01).all()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_samples_and_replicas_are_drawn_independently(name: str) -> None:
    output = torch.zeros(REPLICAS, DRAWS, 2)
    labels = LIKELIHOODS[name].draw(output, seeds()).double()
    columns = labels.reshape(REPLICAS, DRAWS, -1).permute(0, 2, 1).flatten(0, 1)
    rows = torch.cat([columns[:, :-1], columns[:, 1:]])  # each series beside itself, shifted by one
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 5 / DRAWS**0.5


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_replica_draws_as_it_would_alone(name: str) -> None:
    output = torch.randn(REPLICAS, 50, 3)
    together = LIKELIHOODS[name].draw(output, seeds())
    for r, generator in enumerate(seeds()):
        assert torch.equal(LIKELIHOODS[name].draw(output[r : r + 1], [generator])[0], together[r])


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_replica_of_nan_changes_no_other_draw(name: str) -> None:
    output = torch.randn(REPLICAS, 50, 3)
    expected = LIKELIHOODS[name].draw(output, seeds())
    output[0] = torch.nan
    assert torch.equal(LIKELIHOODS[name].draw(output, seeds())[1], expected[1])


def test_losses_are_negative_log_likelihoods() -> None:
    output = torch.randn(2, 5, 3, dtype=torch.float64)
    flat, normal = output.flatten(0, 1), torch.distributions.Normal(output, 1.0)
    classes, bits, targets = (
        torch.randint(3, (2, 5)),
        torch.randint(2, (2, 5, 3)),
        torch.randn(2, 5, 3).double(),
    )
    expected = {
        "categorical": (classes, F.cross_entropy(flat, classes.flatten(), reduction="sum")),
        "bernoulli": (bits, -torch.distributions.Bernoulli(logits=output).log_prob(bits.double()).sum()),
        "gaussian": (targets, -normal.log_prob(targets).sum() - 15 * torch.log(torch.tensor(2 * torch.pi))),
    }
    for name, (labels, loss) in expected.items():
        terms = LIKELIHOODS[name].negative_log(output, labels)
        assert terms.shape == labels.shape
        torch.testing.assert_close(terms.sum(), loss, check_dtype=False)
