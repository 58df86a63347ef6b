"""Families of lane detectors: how to read the outputs of each, one file a family."""
