"""The two published trainings of LSTR, and how both see an image."""

from dataclasses import dataclass

from ptqcore import ModelError, nearest

MEAN = (0.40789654, 0.44719302, 0.47026115)
STD = (0.28863828, 0.27408164, 0.27809835)
"""Of blue, green and red, in units of 0 to 1."""


@dataclass(frozen=True)
class Variant:
    """classes: background, lane, and for CULane one that is never trained. size: (height, width) of the
    images that the network was trained on.

    lowest_bound: whether a lane ends at its lower bound too; else it goes on to the bottom of the image
    and exists only inside it.
    """

    name: str
    classes: int
    size: tuple[int, int]
    lowest_bound: bool


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("tusimple", classes=2, size=(360, 640), lowest_bound=True),
        Variant("culane", classes=3, size=(295, 820), lowest_bound=False),
    )
}


def find_variant(name: str) -> Variant:
    """The variant of a name.

    Raises:
        ModelError: if there is none.
    """
    if name not in VARIANTS:
        raise ModelError(f"task.variant {name!r}: LSTR has no such variant{nearest(name, VARIANTS)}")
    return VARIANTS[name]
