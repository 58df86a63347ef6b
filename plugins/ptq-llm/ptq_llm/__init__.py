"""ptq-llm: post-training quantization of language models."""

from ptqcore import Plugin

plugin = Plugin(
    name="llm",
    tasks={
        "causal-lm": "ptq_llm.causal_lm:CausalLM",
        "text-encoder": "ptq_llm.text_encoder:TextEncoder",
    },
    exporters={
        "awq": "ptq_llm.awq_format:AWQ",
        "compressed-tensors": "ptq_llm.compressed_tensors:CompressedTensors",
        "gguf": "ptq_llm.gguf_export:GGUF",
        "gptq": "ptq_llm.gptq_format:GPTQ",
        "gptq-v2": "ptq_llm.gptq_format:GPTQv2",
    },
    recipes="ptq_llm/recipes",
    default_recipe="w4a16-g64",
)
