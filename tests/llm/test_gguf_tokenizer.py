"""The vocabulary of an exported file gives the tokens of the model's own tokenizer."""

import gguf
import pytest
import tiny_lm
from tiny_gguf import (
    FILE,
    SPLITS,
    TEXT,
    byte_level_tokenizer,
    export,
    load_tokenizer,
    quantized,
    sentencepiece_tokenizer,
    verify,
)
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ptq_llm.gguf_tokenizer import PROBE
from ptqcore import ExportError

OTHER_TEXT = (
    "Hello world 2024! They're HERE, aren't they?  \n\n\tVisit https://x.org/a_b?c=1 — 你好, 12 345 🙂"
)


def exported(tokenizer, folder, rows=None, architecture="llama"):
    """The report's notes and the file's fields, for a model with so many rows in its embedding."""
    model = quantized(architecture, vocab_size=rows or len(tokenizer))
    export(model, folder, tokenizer)
    notes = verify(model, folder, tokenizer).notes
    fields = gguf.GGUFReader(folder / FILE).fields
    prefix = "tokenizer."
    return notes, {key.removeprefix(prefix): fields[key].contents() for key in fields if prefix in key}


def ids(tokenizer, text):
    return tokenizer(text)["input_ids"]


@pytest.mark.parametrize("name", [name for name in SPLITS if name != "smollm"])
def test_the_rule_that_splits_text_is_named_and_transformers_makes_the_same_tokens(name, tmp_path):
    tokenizer = byte_level_tokenizer(*SPLITS[name], text=PROBE + TEXT)
    notes, fields = exported(tokenizer, tmp_path)
    assert (fields["ggml.model"], fields["ggml.pre"]) == ("gpt2", name)
    assert notes == ()
    for text in (TEXT, PROBE, OTHER_TEXT):
        assert ids(load_tokenizer(tmp_path), text) == ids(tokenizer, text)


def test_a_rule_that_transformers_does_not_know_is_named_and_the_report_says_so(tmp_path):
    tokenizer = byte_level_tokenizer(text=PROBE + TEXT)
    digits_apart = byte_level_tokenizer(*SPLITS["smollm"]).backend_tokenizer.pre_tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = digits_apart
    notes, fields = exported(tokenizer, tmp_path)
    assert fields["ggml.pre"] == "smollm"
    assert ids(load_tokenizer(tmp_path), "12345") != ids(tokenizer, "12345")
    assert any("other tokens of some texts" in note for note in notes)


def test_without_merges_every_rule_gives_the_same_tokens(tmp_path):
    tokenizer = tiny_lm.tokenizer()
    notes, _ = exported(tokenizer, tmp_path)
    assert notes == ()
    assert ids(load_tokenizer(tmp_path), OTHER_TEXT) == ids(tokenizer, OTHER_TEXT)


def test_qwens_own_tokenizer_is_told_to_compose_characters(tmp_path):
    tokenizer = byte_level_tokenizer(*SPLITS["qwen2"], text=PROBE)
    notes, fields = exported(tokenizer, tmp_path, architecture="qwen2")
    assert fields["ggml.pre"] == "qwen2"
    assert any("NFC" in note for note in notes)


def test_a_sentencepiece_vocabulary_has_types_scores_and_the_same_tokens(tmp_path):
    tokenizer = sentencepiece_tokenizer()
    notes, fields = exported(tokenizer, tmp_path)
    assert fields["ggml.model"] == "llama"
    assert fields["ggml.add_space_prefix"]
    assert fields["ggml.add_bos_token"]
    assert fields["ggml.tokens"][:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert fields["ggml.token_type"][1:4] == [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.BYTE]
    made = [merge.replace(" ", "") for merge in fields["ggml.merges"]]
    scores = dict(zip(fields["ggml.tokens"], fields["ggml.scores"], strict=True))
    assert [scores[token] for token in made] == sorted((scores[token] for token in made), reverse=True)
    assert notes == ()
    for text in ("hello world", "the fox it's 12345 naïve 你好\n", PROBE):
        assert ids(load_tokenizer(tmp_path), text) == ids(tokenizer, text)


def test_special_tokens_and_the_chat_template_are_kept(tmp_path):
    tokenizer = byte_level_tokenizer(special=("<end>", "<start>"))
    tokenizer.bos_token = "<start>"
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.add_tokens(["<think>"])
    _, fields = exported(tokenizer, tmp_path)
    assert (fields["ggml.bos_token_id"], fields["ggml.eos_token_id"]) == (1, 0)
    assert not fields["ggml.add_bos_token"]
    assert fields["ggml.token_type"][:2] == [gguf.TokenType.CONTROL] * 2
    assert fields["ggml.token_type"][-1] == gguf.TokenType.USER_DEFINED
    read = load_tokenizer(tmp_path)
    text = "<start>the quick <think> fox<end>"
    assert ids(read, text) == ids(tokenizer, text)
    assert read.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_rows_without_a_token_get_an_unused_one(tmp_path):
    tokenizer = byte_level_tokenizer()
    notes, fields = exported(tokenizer, tmp_path, rows=len(tokenizer) + 2)
    assert fields["ggml.tokens"][-1] == f"[PAD{len(tokenizer) + 1}]"
    assert fields["ggml.token_type"][-3:] == [gguf.TokenType.NORMAL] + [gguf.TokenType.UNUSED] * 2
    assert notes == ()


def test_added_tokens_without_a_row_are_left_out(tmp_path):
    tokenizer = byte_level_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    _, fields = exported(tokenizer, tmp_path, rows)
    assert len(fields["ggml.tokens"]) == rows
    assert "ggml.padding_token_id" not in fields


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    tokenizer = byte_level_tokenizer()
    with pytest.raises(ExportError, match="the tokenizer of another model"):
        exported(tokenizer, tmp_path, rows=len(tokenizer) - 1)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    with pytest.raises(ExportError, match="cannot hold a Unigram tokenizer"):
        exported(tokenizer, tmp_path, rows=300)


def test_a_rule_without_a_name_is_refused(tmp_path):
    tokenizer = byte_level_tokenizer("[aeiou]", text=PROBE * 2)
    with pytest.raises(ExportError, match="splits text by a rule that is not one of"):
        exported(tokenizer, tmp_path)
