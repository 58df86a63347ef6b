"""NNCF's post-training quantization of an OpenVINO graph, with its defaults."""

from importlib import import_module
from typing import Any

from request import measured, read_request, read_sample, sample_files


def main() -> None:
    """All samples calibrate; constants that stay in float are kept in 32 bits."""
    folder, request = read_request()
    nncf: Any = import_module("nncf")
    openvino: Any = import_module("openvino")
    files, file = sample_files(request), "model.xml"
    with measured(folder, file):
        model = openvino.Core().read_model(request["full_precision"])
        quantized = nncf.quantize(model, nncf.Dataset(files, read_sample), subset_size=len(files))
        openvino.save_model(quantized, str(folder / file), compress_to_fp16=False)


if __name__ == "__main__":
    main()
