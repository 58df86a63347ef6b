"""A small network that finds points of lanes, in the manner of GANet (arXiv 2204.07335)."""

from torch import Tensor, nn

from ptq_lane.networks.backbone import Backbone, ConvNormAct

_HIDDEN = 32


class KeypointNet(nn.Module):
    """Images [n, 3, height, width] to the outputs of `ptq_lane.families.keypoint`, at stride 4.

    `keypoints` and `starts` [n, 1, height / 4, width / 4]; `to_start` and `subpixel` [n, 2, …].
    """

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.hidden = nn.Sequential(
            ConvNormAct(self.backbone.out_channels, _HIDDEN), ConvNormAct(_HIDDEN, _HIDDEN)
        )
        self.keypoints = nn.Conv2d(_HIDDEN, 1, 1)
        self.starts = nn.Conv2d(_HIDDEN, 1, 1)
        self.to_start = nn.Conv2d(_HIDDEN, 2, 1)
        self.subpixel = nn.Conv2d(_HIDDEN, 2, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = self.hidden(self.upsample(self.backbone(images)))
        return {
            "keypoints": self.keypoints(hidden),
            "starts": self.starts(hidden),
            "to_start": self.to_start(hidden),
            "subpixel": self.subpixel(hidden),
        }
