"""The task `classification`: which of the classes is on a picture."""

import torch
from torch import Tensor, nn

from ptq_vision import labels, metrics
from ptq_vision.image_task import ImageTask
from ptq_vision.images import ImageSet
from ptqcore import ModelError


class Classification(ImageTask):
    """Metrics, all but the last in percent: top1 and top5 (where labels are known), and compared with
    full precision agreement (pictures with the same first class) and logit_error (relative squared).
    """

    name = "classification"

    def read_labels(self, images: ImageSet) -> None:
        """The class of every picture, if it is known."""
        self._labels: Tensor | None = None
        self._reference: Tensor | None = None
        found = labels.classes_of(images, self.options.labels)
        if found is not None:
            labels.check_range(found, self.classes, lambda index: images.names[index])
            self._labels = torch.from_numpy(found[self.evaluated])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """See the class."""
        quantized = self._reference is not None
        label = "measuring the quantized model" if quantized else "measuring full precision"
        logits = torch.stack([output for _, output in self.outputs(model, label)])
        if logits.ndim != 2:
            raise ModelError(
                f"task.model {self.options.model!r} returns {list(logits.shape[1:])} values for a picture, "
                "a classifier [classes]: is it one for the task segmentation?"
            )
        if self._reference is None:
            self._reference = logits
        figures = {}
        if self._labels is not None:
            figures["top1"] = metrics.top_k(logits, self._labels, 1)
            figures["top5"] = metrics.top_k(logits, self._labels, 5)
        figures["agreement"] = metrics.agreement(logits.argmax(1), self._reference.argmax(1))
        figures["logit_error"] = metrics.relative_error(logits, self._reference)
        return figures
