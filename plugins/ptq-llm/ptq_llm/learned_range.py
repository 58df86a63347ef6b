"""The range of a weight as a variable (OmniQuant, Shao et al., arXiv 2308.13137, section 3.2)."""

import torch
from torch import Tensor

from ptq_llm.straight_through import round_in_range
from ptqcore import QuantSpec, grid

_LARGEST = 4.0  # where the paper starts: a share of sigmoid(4) = 0.982


class LearnedRange:
    """The range of a weight, as sigmoid(v) of its smallest and largest values, for every scale.

    One v serves both ends of a symmetric grid. Where a range begins at more than sigmoid(4) of the
    extremes, it begins with v = 4, and v = 4 is where it begins: the sigmoid is flat above.
    """

    def __init__(self, weight: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> None:
        """Args:
        weight: [out, in].
        low, high: where its range begins, in the layout of the grid.
        spec: any grid.
        """
        self.spec = spec
        self._low, self._high = low.float(), high.float()
        lowest, highest = grid.value_range(weight.float(), spec)
        if spec.symmetric:
            shares = [share_of(torch.maximum(-self._low, self._high), torch.maximum(-lowest, highest))]
        else:
            shares = [share_of(self._low, lowest), share_of(self._high, highest)]
        start = torch.special.logit(torch.stack(shares)).clamp(-_LARGEST, _LARGEST)
        self._first = start.sigmoid()
        self.variable = start.clone().requires_grad_(True)

    def factors(self) -> Tensor:
        """What the range is now of where it began: of the low end and of the high one, or of both [1 or 2,
        layout]."""
        return self.variable.sigmoid() / self._first

    def ends(self) -> tuple[Tensor, Tensor]:
        """The range as it now is, in the layout of the grid."""
        factors = self.factors()
        return self._low * factors[0], self._high * factors[-1]

    def rounded(self, weight: Tensor) -> Tensor:
        """The weight rounded in the range as it now is, in its dtype."""
        return round_in_range(weight.float(), *self.ends(), self.spec, weight.dtype).to(weight.dtype)


def share_of(end: Tensor, extreme: Tensor) -> Tensor:
    """end / extreme in [0, 1]; 1 where there is nothing on that side."""
    return torch.where(extreme == 0, torch.ones_like(end), end / extreme).clamp(0, 1)
