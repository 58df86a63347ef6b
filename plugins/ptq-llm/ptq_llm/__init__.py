"""ptq-llm: post-training quantization of language models."""

from ptqcore import Plugin

plugin = Plugin(
    name="llm",
    tasks={"causal-lm": "ptq_llm.causal_lm:CausalLM"},
    exporters={"compressed-tensors": "ptq_llm.compressed_tensors:CompressedTensors"},
    recipes="ptq_llm/recipes",
    default_recipe="w4a16-g64",
)
