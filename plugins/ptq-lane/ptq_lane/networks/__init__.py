"""The small networks that ptq-lane ships, one a family of lane detectors."""
