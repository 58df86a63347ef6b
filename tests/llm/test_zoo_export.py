"""Compressed-tensors exports of every family load in transformers with the logits of the model."""

import pytest
import tiny_llama
import zoo
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from ptq_llm.unify import unify
from ptqcore import MinMax, QuantizedTensor, QuantLinear, QuantSpec

INT4 = QuantSpec(bits=4, granularity="group", group_size=16)
# transformers 5.23 asks a Falcon that is loading for weights that its compressed layers have not.
DEQUANTIZED = ("falcon_old", "falcon_new")
NAMES = [
    name for name in zoo.NAMES if name != "gpt2"
]  # its layers are refused: readers keep them as Conv1D


def quantized(name):
    """The model, all layers of its body rounded to 4 bits."""
    model = zoo.build(name)
    unify(model)
    body, head = set(model.base_model.modules()), model.get_output_embeddings()
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and layer in body and layer is not head:
            observer = MinMax(INT4)
            observer.update(layer.weight.detach())
            new = QuantLinear(layer, INT4, None)
            new.set_weight(QuantizedTensor.from_range(layer.weight, *observer.range(), INT4))
            model.set_submodule(path, new)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_the_export_loads_with_the_logits_of_the_model(name, tmp_path):
    model = quantized(name)
    tiny_llama.export(model, tmp_path)
    assert tiny_llama.read_back(model, tmp_path) == 0
    dequantize = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    exported, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, **(dequantize if name in DEQUANTIZED else {})
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = zoo.logits(model)
    assert (zoo.logits(exported.eval()) - expected).abs().max() <= 1e-4
    assert (zoo.logits(zoo.build(name)) - expected).abs().max() > 1e-2
