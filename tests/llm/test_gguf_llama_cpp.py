"""llama.cpp itself runs exported files: the model's next-token probabilities and its tokenizer's tokens."""

import json
import urllib.request

import pytest
import torch
from tiny_gguf import (
    FILE,
    Q4_0,
    Q4_0_SIGNED,
    Q4_1,
    Q8_0,
    SPLITS,
    TEXT,
    byte_level_tokenizer,
    export,
    quantized,
    sentencepiece_tokenizer,
)
from tiny_llama import quantize
from zoo import build

from ptq_llm.gguf_tokenizer import PROBE

xllamacpp = pytest.importorskip("xllamacpp", reason="pip install --no-deps xllamacpp")

TOKENIZER = byte_level_tokenizer(text=PROBE + TEXT)
VOCABULARY = len(TOKENIZER)
# Keys and values are kept as float16, and inputs of blocks as 8-bit integers: 0.04 was measured where
# one layer is quantized, and more than 4 for rows in the wrong order.
TOLERANCE = 0.2
MODELS = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-heads-of-32": ("llama", {"head_dim": 32}),
    "llama3-rotation": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3-tied": ("qwen3", {}),
}
GRIDS = {"Q4_0": Q4_0, "Q4_0-signed": Q4_0_SIGNED, "Q4_1": Q4_1, "Q8_0": Q8_0}


class Engine:
    """llama.cpp's server, in this process."""

    def __init__(self, file):
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 64, 1, 1
        params.warmup = params.fit_params = False
        self._server = xllamacpp.Server(params)

    def _ask(self, path, body):
        request = urllib.request.Request(
            self._server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def tokens(self, text):
        return self._ask("/tokenize", {"content": text, "add_special": True})["tokens"]

    def log_probabilities(self, tokens):
        """Of every token of the vocabulary to come next, before the bias by which a letter is chosen:
        the server keeps the others to itself until they make a whole character."""
        letter = TOKENIZER.convert_tokens_to_ids("a")
        body = {"prompt": tokens, "n_predict": 1, "n_probs": VOCABULARY, "logit_bias": [[letter, 1000]]}
        answer = self._ask("/completion", body | {"temperature": -1.0, "cache_prompt": False})
        found = torch.empty(VOCABULARY)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_gives_the_models_probabilities(name, grid, tmp_path):
    architecture, changes = MODELS[name]
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    model = build(architecture, **(special | {"vocab_size": VOCABULARY} | changes))
    model = quantize(model, GRIDS[grid], within="layers.1.mlp.up_proj")
    export(model, tmp_path, TOKENIZER)
    engine = Engine(tmp_path / FILE)
    for tokens in torch.randint(1, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1)):
        with torch.no_grad():
            expected = model(tokens[None]).logits[0, -1].log_softmax(-1)
        assert (engine.log_probabilities(tokens.tolist()) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", [*SPLITS, "sentencepiece"])
def test_llama_cpp_makes_the_tokenizers_tokens(name, tmp_path):
    if name == "sentencepiece":
        tokenizer = sentencepiece_tokenizer()
    else:
        tokenizer = byte_level_tokenizer(*SPLITS[name], text=PROBE + TEXT)
    export(quantized(vocab_size=len(tokenizer)), tmp_path, tokenizer)
    engine = Engine(tmp_path / FILE)
    for text in (PROBE, TEXT, "Hello world 2024! They're HERE\n\n\t12 345"):
        assert engine.tokens(text) == tokenizer(text)["input_ids"]
