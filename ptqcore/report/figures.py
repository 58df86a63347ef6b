"""What a task shows of its results: curves, and pictures."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from ptqcore.errors import PluginError
from ptqcore.report.charts import xml_text
from ptqcore.report.curve_chart import curves
from ptqcore.report.legend import Chart, kind_colours
from ptqcore.report.png import png

if TYPE_CHECKING:
    from torch import Tensor

# Pictures are enlarged, by a whole number, up to the smaller side, and shrunk to the larger.
SMALL_SIDE, LARGE_SIDE = 80, 256


@dataclass(frozen=True)
class Curves:
    """Curves over one horizontal axis.

    x: [n], in any order. series: name → values [n]; NaN and infinity leave a gap. The vertical axis is
    logarithmic, and says so, where the values span a decade or more and none of them is negative.

    Raises:
        PluginError: if a series has another length than x.
    """

    title: str
    x: Sequence[float]
    series: Mapping[str, Sequence[float]]
    x_label: str
    y_label: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for name, values in self.series.items():
            if len(values) != len(self.x):
                raise PluginError(
                    f"curves {self.title!r}: series {name!r} has {len(values)} values for {len(self.x)} of "
                    "x: give one for each"
                )

    def draw(self) -> Chart:
        """The drawing and its legend."""
        colours = kind_colours(self.series)
        svg = curves(
            self.x, self.series, colours, title=self.title, x_label=self.x_label, y_label=self.y_label
        )
        return Chart(Markup(svg), colours, self.note)


@dataclass(frozen=True)
class Pictures:
    """Pictures in labelled rows, to be compared from row to row.

    rows: label → images [h, w], [1, h, w] (grey) or [3, h, w] (RGB) in [0, 1]; values outside are drawn
    as the nearer end, NaN as 0. Small ones are enlarged pixel by pixel.

    Raises:
        PluginError: if an image has another shape.
    """

    title: str
    rows: Mapping[str, Sequence["Tensor"]]
    note: str = ""

    def __post_init__(self) -> None:
        for label, images in self.rows.items():
            for image in images:
                shape = list(image.shape)
                if (
                    not image.numel()
                    or len(shape) not in (2, 3)
                    or (len(shape) == 3 and shape[0] not in (1, 3))
                ):
                    raise PluginError(
                        f"pictures {self.title!r}: an image of row {label!r} has shape {shape}; expected "
                        "[h, w], [1, h, w] or [3, h, w], not empty"
                    )

    def draw(self) -> Chart:
        """A table with the pictures inside; a row is a row."""
        rows = "".join(self._row(label, images) for label, images in self.rows.items())
        if not rows:
            return Chart(Markup('<p class="hint">no data</p>'), note=self.note)
        return Chart(Markup(f'<table class="pictures"><tbody>{rows}</tbody></table>'), note=self.note)

    def _row(self, label: str, images: Sequence["Tensor"]) -> str:
        cells = "".join(
            f"<td>{_img(image, f'{self.title}: {label}, {number} of {len(images)}')}</td>"
            for number, image in enumerate(images, 1)
        )
        return f'<tr><th scope="row">{xml_text(label)}</th>{cells}</tr>'


def _img(image: "Tensor", alt: str) -> str:
    height, width = image.shape[-2:]
    side = max(height, width)
    larger = max(1, SMALL_SIDE // side)
    scale = min(larger, LARGE_SIDE / side)
    style = ' class="pixels"' if larger > 1 else ""
    data = b64encode(png(image if image.ndim == 3 else image[None])).decode()
    shown = [max(1, round(length * scale)) for length in (width, height)]
    return (
        f'<img{style} width="{shown[0]}" height="{shown[1]}" alt="{xml_text(alt)}" '
        f'src="data:image/png;base64,{data}">'
    )
