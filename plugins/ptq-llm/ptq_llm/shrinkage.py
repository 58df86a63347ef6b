"""How much of a Gram from few tokens can be believed."""

import torch
from torch import Tensor


def shrunk(gram: Tensor, tokens: int) -> Tensor:
    """(1 − ρ) G + ρ diag(G): the share ρ of the products between channels is taken as chance.

    ρ is that of the oracle approximating shrinkage (Chen et al., arXiv 0907.4698, eq. 23) for the Gram
    scaled to a diagonal of ones, S with p channels:

        ρ = ((1 − 2/p) tr S² + p²) / ((n + 1 − 2/p) (tr S² − p)), 1 at most

    It is small where channels are strongly tied, or tokens many; with 1 left of the Gram is its diagonal,
    for which GPTQ is rounding to nearest.

    Args:
        gram: XᵀX [channels, channels].
        tokens: n, the rows of X.
    """
    diagonal = gram.diagonal()
    alive = diagonal > 0
    channels = int(alive.sum())
    roots = torch.where(alive, diagonal, 1.0).rsqrt()
    squares = float((gram * roots * roots.unsqueeze(1)).square().sum(dtype=torch.float64))
    if channels < 2 or squares <= channels:
        return gram
    less = 1 - 2 / channels
    share = (less * squares + channels**2) / ((tokens + less) * (squares - channels))
    result = gram * (1 - min(share, 1.0))
    result.diagonal().copy_(diagonal)
    return result
