"""The network of an OpenMMLab model: images in, what its head says out."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ptqcore import ModelError


class Network(nn.Module):
    """A model of mmseg or mmdet without its data samples; the layers keep their paths below `model`.

    Of a segmentor it returns the logits [n, classes, h, w] at the size of the images, as mmseg's own
    post-process has them; of a detector what its head returns, for an adapter of the user's own.
    """

    def __init__(self, model: nn.Module) -> None:
        """Args:
        model: with one `decode_head` or `bbox_head` that is a function of the features alone.
        """
        super().__init__()
        head = getattr(model, "decode_head", None) or getattr(model, "bbox_head", None)
        if not isinstance(head, nn.Module) or isinstance(head, nn.ModuleList):
            raise ModelError(
                f"a {type(model).__name__} is not supported: segmentors of mmseg with one decoder and "
                "one-stage detectors of mmdet are"
            )
        self.model = model
        self.segments = hasattr(model, "decode_head")
        self.align_corners = bool(getattr(head, "align_corners", False))

    def forward(self, images: Tensor) -> Any:
        """Args:
        images: [n, 3, h, w].
        """
        model: Any = self.model
        features = model.extract_feat(images)
        if not self.segments:
            return model.bbox_head(features)
        logits = model.decode_head(features)
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=self.align_corners)
