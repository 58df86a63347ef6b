"""ptq-vision: post-training quantization of image classifiers and segmentation networks."""

from ptqcore import Plugin

plugin = Plugin(
    name="vision",
    tasks={
        "classification": "ptq_vision.classification:Classification",
        "segmentation": "ptq_vision.segmentation:Segmentation",
    },
    recipes="ptq_vision/recipes",
    default_recipe="w8a8",
)
