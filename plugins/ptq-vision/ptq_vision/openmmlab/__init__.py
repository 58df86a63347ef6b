"""OpenMMLab models: segmentation networks of mmseg and one-stage detectors of mmdet."""
