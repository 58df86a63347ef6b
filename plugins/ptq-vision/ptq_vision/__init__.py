"""ptq-vision: post-training quantization of image classifiers, segmentation networks and detectors."""

from ptqcore import Plugin

plugin = Plugin(
    name="vision",
    tasks={
        "classification": "ptq_vision.classification:Classification",
        "segmentation": "ptq_vision.segmentation:Segmentation",
        "detection": "ptq_vision.openmmlab.task_detection:Detection",
    },
    recipes="ptq_vision/recipes",
    default_recipe="w8a8",
)
