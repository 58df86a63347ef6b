"""What the small networks see."""

from torch import Tensor

WIDTH, HEIGHT = 192, 96


def normalised(images: Tensor) -> Tensor:
    """RGB images uint8 [n, h, w, 3] as float32 [n, 3, h, w]: black is -2, white 2."""
    return (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
