"""Literal K-FAC-reduce (Eschenhagen et al. 2023): a sample's positions go together before the products."""

from collections.abc import Hashable

from torch import Tensor

from tests.reference.coarse import LiteralTwoLevelKFAC
from tests.reference.kfac import PerLayer


class LiteralReducedKFAC(LiteralTwoLevelKFAC):
    """The mean of ``a`` and the sum of ``g`` over positions, then as for layers without positions."""

    def statistics(self, a: PerLayer, g: PerLayer) -> dict[Hashable, Tensor]:
        means = {name: x.reshape(*x.shape[:2], -1).mean(dim=2) for name, x in a.items()}
        sums = {name: x.reshape(*x.shape[:2], -1).sum(dim=2) for name, x in g.items()}
        reduced = super().statistics(means, sums)
        exact = super().statistics(a, g)  # which knows of no approximation to the sum over positions
        return reduced | {
            key: value for key, value in exact.items() if isinstance(key, tuple) and key[0] == "pp"
        }
