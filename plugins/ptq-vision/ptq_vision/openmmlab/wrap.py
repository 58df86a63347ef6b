"""The network that is deployed: one image tensor in, the raw tensors of the head out."""

from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from ptqcore import ModelError


class Network(nn.Module):
    """An mmseg or mmdet model without its data samples; the layers keep their paths below `model`.

    Its output is, for a segmentor, the logits [n, classes, h, w] before they are resized to the
    image, and for a detector the tensors of its head, level by level, in the order in which the
    head returns them: first those of one kind of every level, then those of the next kind.

    What it computes is `model(image, mode="tensor")`, written so that it can be followed: no module
    stands at two paths, none writes over its input, and the head is called as a module.
    """

    def __init__(self, model: nn.Module) -> None:
        """Args:
        model: a segmentor of mmseg, or a one-stage detector of mmdet; changed in place.
        """
        super().__init__()
        if not _is_supported(model):
            raise ModelError(
                f"a {type(model).__name__} is not supported: segmentors of mmseg with one decoder and "
                "one-stage detectors of mmdet are, such as RTMDet, YOLOX, RetinaNet, FCOS, ATSS and GFL"
            )
        self.model = model
        self.train(model.training)
        _unshare(model)
        for module in model.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Args:
        image: [n, 3, h, w], normalized as `Preprocessing` does.
        """
        model: Any = self.model
        output = _head(model)(model.extract_feat(image))
        return output if isinstance(output, Tensor) else tuple(_flat(output))


def _head(model: nn.Module) -> Any:
    return getattr(model, "decode_head", None) or getattr(model, "bbox_head", None)


def _unshare(model: nn.Module) -> None:
    """Give every path a module of its own: RTMDet's levels share convolutions, with norms of their own."""
    seen, copied = set(), "."
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if path.startswith(copied):
            continue
        if id(module) in seen:
            model.set_submodule(path, deepcopy(module))
            copied = f"{path}."
        seen.add(id(module))


def _is_supported(model: nn.Module) -> bool:
    """Whether the head is a function of the features alone, and returns classes or boxes of each place."""
    if getattr(model, "mask_head", None) is not None:
        return False
    head = _head(model)
    bases = {base.__name__ for base in type(head).__mro__}
    return bool(bases & {"BaseDecodeHead", "BaseDenseHead"}) and not hasattr(head, "mask_head")


def _flat(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [tensor for part in output for tensor in _flat(part)]
