"""OpenMMLab models: segmentation networks of mmseg, and detectors of mmdet for an adapter of one's own."""
