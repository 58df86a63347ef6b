"""A small row-anchor network after Ultra Fast Lane Detection (arXiv 2004.11757, 2206.07389)."""

from torch import Tensor, nn

from ptq_lane.networks.backbone import STRIDE, Backbone, ConvNormAct

_REDUCED = 4
_HIDDEN = 40


class RowAnchorNet(nn.Module):
    """Images [n, 3, height, width] to the logits of `ptq_lane.families.row_anchor`.

    `location` [n, cells, anchors, slots]; `existence` [n, 2, anchors, slots], absent first.
    """

    def __init__(
        self, cells: int = 32, anchors: int = 18, slots: int = 4, height: int = 96, width: int = 192
    ) -> None:
        """Args:
        cells: across the width.
        anchors: rows in which lanes are located.
        height, width: of the images, multiples of 8.
        """
        super().__init__()
        self.sizes = (anchors, slots)
        self.backbone = Backbone()
        self.reduce = ConvNormAct(self.backbone.out_channels, _REDUCED)
        self.flatten = nn.Flatten()
        self.hidden = nn.Linear(_REDUCED * (height // STRIDE) * (width // STRIDE), _HIDDEN)
        self.act = nn.ReLU()
        self.location = nn.Linear(_HIDDEN, cells * anchors * slots)
        self.existence = nn.Linear(_HIDDEN, 2 * anchors * slots)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = self.act(self.hidden(self.flatten(self.reduce(self.backbone(images)))))
        return {
            "location": self.location(hidden).unflatten(1, (-1, *self.sizes)),
            "existence": self.existence(hidden).unflatten(1, (2, *self.sizes)),
        }
