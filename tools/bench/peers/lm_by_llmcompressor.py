"""GPTQ or AWQ of llm-compressor on the same tokens, 4-bit symmetric weights in groups of 64."""

import os
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.quantization import GPTQModifier
from request import measured, read_request
from transformers import AutoModelForCausalLM, AutoTokenizer


def modifier(method: str) -> Any:
    """The method with the settings that its documentation gives, for our scheme."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    scheme = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    return GPTQModifier(**scheme) if method == "gptq" else AWQModifier(**scheme)


def main() -> None:
    """Measured are calibrating and quantizing, without loading and saving."""
    folder, request = read_request()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    # Its AWQ pins memory, which needs a GPU.
    setattr(torch.Tensor, "pin_memory", lambda self, *args: self)  # noqa: B010
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32)
    tokens = np.load(Path(request["samples"]))["tokens"]
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    with measured(folder, "model"):
        oneshot(
            model=model,
            dataset=Dataset.from_list(rows),
            recipe=modifier(request["method"]),
            max_seq_length=tokens.shape[1],
            num_calibration_samples=len(tokens),
        )
    model.save_pretrained(folder / "model", save_compressed=True)
    AutoTokenizer.from_pretrained(request["model"]).save_pretrained(folder / "model")


if __name__ == "__main__":
    main()
