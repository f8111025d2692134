"""KroneckerBlocks: what is remembered, per layer and per replica."""

import pytest
import torch
from torch import Tensor

from kfac2.curvature import INVERSES, KroneckerBlocks

LAYERS, REPLICAS, D_OUT, D_IN = 3, 2, 3, 4
BOTH = torch.ones(LAYERS, dtype=torch.bool)
each_inverse = pytest.mark.parametrize("inverse", INVERSES)


def blocks(inverse: str = "eigen", d_in: int = D_IN) -> KroneckerBlocks:
    return KroneckerBlocks(LAYERS, REPLICAS, D_OUT, d_in, inverse, dtype=torch.float64)


def sample(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(LAYERS, REPLICAS, D_IN, 9, generator=generator, dtype=torch.float64)
    g = torch.randn(LAYERS, REPLICAS, D_OUT, 9, generator=generator, dtype=torch.float64)
    return a @ a.mT / 9, g @ g.mT / 9


@each_inverse
def test_the_inverse_is_that_of_the_averaged_factors(inverse: str) -> None:
    subject, (a1, g1), (a2, g2) = blocks(inverse), sample(1), sample(2)
    assert not subject.fold(a1, g1, BOTH, 0.5).any()
    assert not subject.fold(a2, g2, BOTH, 0.25).any()
    assert not subject.refresh_inverse(0.1).any()
    gradient = torch.randn(LAYERS, REPLICAS, D_OUT, D_IN, dtype=torch.float64)
    expected = INVERSES[inverse].compute(0.25 * a1 + 0.75 * a2, 0.25 * g1 + 0.75 * g2, 0.1)
    torch.testing.assert_close(subject.inverse.apply(gradient), expected.apply(gradient))


@each_inverse
@pytest.mark.parametrize("factor", ["a", "g"])
def test_a_bad_sample_leaves_its_layer_and_replica_as_they_were(inverse: str, factor: str) -> None:
    subject, healthy = blocks(inverse), blocks(inverse)
    for one in (subject, healthy):
        one.fold(*sample(1), BOTH, 0.0)
        one.refresh_inverse(0.1)
    before, a, g = subject.state(1), *sample(2)
    healthy.fold(a, g, BOTH, 0.5)
    (a if factor == "a" else g)[1, 0, 0, 0] = torch.nan
    rejected = subject.fold(a, g, BOTH, 0.5)
    assert rejected.nonzero().tolist() == [[1, 0]]
    subject.refresh_inverse(0.1)
    healthy.refresh_inverse(0.1)
    for layer in range(LAYERS):
        for key, value in subject.state(layer).items():
            if key == "attempted":
                continue
            assert torch.equal(value[1], healthy.state(layer)[key][1])
            expected = before[key] if layer == 1 else healthy.state(layer)[key]
            assert torch.equal(value[0], expected[0])


@each_inverse
def test_a_bad_first_sample_leaves_no_inverse_there(inverse: str) -> None:
    subject, (a, g) = blocks(inverse), sample(1)
    a[2, 1] = torch.inf
    subject.fold(a, g, BOTH, 0.0)
    assert subject.refresh_inverse(0.1).nonzero().tolist() == [[2, 1]]
    assert subject.missing_inverse().nonzero().tolist() == [[2, 1]]
    a, g = sample(2)
    subject.fold(a, g, BOTH, 0.5)
    assert torch.equal(subject.a[2, 1], a[2, 1])  # a first observation, not averaged with nothing
    assert not subject.refresh_inverse(0.1).any()
    assert not subject.missing_inverse().any()


def test_an_absent_layer_is_neither_averaged_nor_missed() -> None:
    subject, (a, g) = blocks(), sample(1)
    present = torch.tensor([True, False, True])
    a[1] = torch.nan
    assert not subject.fold(a, g, present, 0.0).any()
    assert not subject.refresh_inverse(0.1).any()
    assert not subject.missing_inverse().any()
    assert subject.attempted.tolist() == present.tolist()
    assert subject.seen[:, 0].tolist() == present.tolist()


@each_inverse
def test_state_goes_through(inverse: str) -> None:
    source, target = blocks(inverse), blocks(inverse)
    source.fold(*sample(1), torch.tensor([True, True, False]), 0.0)
    source.refresh_inverse(0.1)
    target.load([source.state(layer) for layer in range(LAYERS)])
    for layer in range(LAYERS):
        for key, value in source.state(layer).items():
            torch.testing.assert_close(target.state(layer)[key], value, rtol=0, atol=0, equal_nan=True)


def test_a_held_state_stays_as_it_was() -> None:
    subject = blocks()
    subject.fold(*sample(1), BOTH, 0.0)
    subject.refresh_inverse(0.1)
    held = subject.state(0)
    copies = {key: value.clone() for key, value in held.items()}
    subject.fold(*sample(2), BOTH, 0.5)
    subject.refresh_inverse(0.1)
    assert all(torch.equal(held[key], copies[key]) for key in held)


def test_foreign_states_are_refused() -> None:
    with pytest.raises(ValueError, match="another `inverse`"):
        blocks("eigen").check_state("0", blocks("tikhonov").state(0))
    with pytest.raises(ValueError, match="shape"):
        blocks().check_state("0", blocks(d_in=D_IN + 1).state(0))
