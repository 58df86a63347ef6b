"""ONNX Runtime's static quantizer, with the formats that its kernels for x86 are fastest in."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from request import measured, read_request, read_sample, sample_files


class Samples:
    """The samples one after the other, which is all that the calibrator asks for."""

    def __init__(self, files: list[Path]) -> None:
        self._files: Iterator[Path] = iter(files)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next sample, None after the last."""
        file = next(self._files, None)
        return None if file is None else read_sample(file)


def main() -> None:
    """QDQ, U8 activations, S8 weights per channel, ranges from minimum and maximum."""
    folder, request = read_request()
    quantization: Any = import_module("onnxruntime.quantization")
    prepare = import_module("onnxruntime.quantization.shape_inference").quant_pre_process
    prepared, file = str(folder / "prepared.onnx"), "model.onnx"
    quantization.CalibrationDataReader.register(Samples)
    with measured(folder, file):
        try:
            prepare(request["full_precision"], prepared)
        except Exception:  # its symbolic shapes do not know every graph, and it says to leave them out then
            prepare(request["full_precision"], prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            str(folder / file),
            Samples(sample_files(request)),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax,
        )


if __name__ == "__main__":
    main()
