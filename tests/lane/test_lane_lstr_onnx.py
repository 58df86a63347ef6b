"""LSTR in ONNX Runtime."""

import numpy as np
import pytest
import torch

from ptq_lane.lstr import LSTR

onnxruntime = pytest.importorskip("onnxruntime")


def test_lstr_runs_in_onnx_runtime_at_any_batch(tmp_path):
    network = LSTR(classes=3).eval()
    images = torch.randn(2, 3, 64, 96)
    program = torch.onnx.export(network, (images,), dynamo=True, dynamic_shapes=({0: "n"},), verbose=False)
    program.save(str(tmp_path / "lstr.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "lstr.onnx"))
    for count in (1, 3):
        images = torch.randn(count, 3, 64, 96)
        with torch.no_grad():
            expected = list(network(images).values())
        found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        for ours, theirs in zip(expected, found, strict=True):
            np.testing.assert_allclose(theirs, ours.numpy(), rtol=1e-3, atol=1e-4)
