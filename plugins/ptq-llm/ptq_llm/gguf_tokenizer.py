"""The vocabulary of a GGUF file: what llama.cpp and transformers rebuild a tokenizer from.

The kind of tokenizer is read from the `tokenizers` library's own description of it. The rule by which
it splits text before merging has only a name in the file; it is found by trying the named rules on a
text that tells them apart.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import gguf
from gguf import TokenType
from tokenizers import Regex, Tokenizer, pre_tokenizers

from ptqcore import ExportError

PROBE = (
    "Hello world, it's 12345 o'clock!  Isn't I'LL\tsee\n\n  \r\nyou're  at 3.14159e-10?? (ok) [x]; a_b\n"
    "HTTPServer camelCase naïve café Übermäßig Ελληνικά Привет мир 你好世界 こんにちは 안녕 १२३ "
    "\u00a0\u2028 \U0001d7d9\U0001d7da 🙂👩‍👩‍👧 <html attr='1'>\n"
    "\t\tdef f(x):\n        return x**2  # done...\n   "
)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE = re.compile("<0x[0-9A-F]{2}>")
# llama.cpp's name of a rule → the expressions that split, one after another (llama-vocab.cpp).
_RULES = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace("{1,3}", ""),),
    "tekken": (_TEKKEN,),
}


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Any, size: int) -> None:
    """Write a fast tokenizer of transformers.

    Args:
        writer: of the file.
        tokenizer: the tokenizer.
        size: rows of the embedding; ids that have no token are filled up with unused ones, and added
            tokens that have no row are left out.

    Raises:
        ExportError: if the format, or its readers, have no such tokenizer.
    """
    backend: Tokenizer = tokenizer.backend_tokenizer
    description: dict[str, Any] = json.loads(backend.to_str())
    model = description["model"]
    if model["type"] != "BPE":
        raise ExportError(f"export gguf cannot hold a {model['type']} tokenizer, only BPE ones")
    tokens, types = _tokens(description, size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model["byte_fallback"]:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(backend.encode("a", add_special_tokens=False).tokens[0].startswith("▁"))
        writer.add_token_scores(_scores(tokens, merges))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_rule(backend, description))
        if not merges:  # transformers would derive them from scores: from single bytes, none
            writer.add_token_scores([0.0] * size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    _add_special_tokens(writer, tokenizer, size)


def _tokens(description: dict[str, Any], size: int) -> tuple[list[str], list[TokenType]]:
    """Token and type of every id below `size`.

    Raises:
        ExportError: if there are tokens beyond, other than added ones.
    """
    model = description["model"]
    if model["vocab"] and max(model["vocab"].values()) >= size:
        raise ExportError(
            f"export gguf: the tokenizer has {len(model['vocab'])} tokens, but the embedding only {size} "
            "rows: the model's folder has the tokenizer of another model"
        )
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    known = {id: (text, TokenType.NORMAL) for text, id in model["vocab"].items()}
    if model["byte_fallback"]:
        known |= {
            id: (text, TokenType.BYTE) for text, id in model["vocab"].items() if _BYTE.fullmatch(text)
        }
    for added in description["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        known[added["id"]] = (added["content"], kind)
    if model["unk_token"] is not None:
        known[model["vocab"][model["unk_token"]]] = (model["unk_token"], TokenType.UNKNOWN)
    for id, (text, kind) in known.items():
        if id < size:
            tokens[id], types[id] = text, kind
    return tokens, types


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """Scores by which llama.cpp, which merges the pair of the highest first, merges in the same order."""
    rank: dict[str, int] = {}
    for index, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), index)
    return [-float(rank.get(token, 0)) for token in tokens]


def _rule(backend: Tokenizer, description: dict[str, Any]) -> str:
    """llama.cpp's name of the rule by which a byte-level tokenizer splits text.

    Raises:
        ExportError: if none of those known here gives the same tokens.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rules = {
        name: pre_tokenizers.Sequence(
            [*(pre_tokenizers.Split(Regex(one), behavior="isolated") for one in expressions), byte_level]
        )
        for name, expressions in _RULES.items()
    }
    if backend.pre_tokenizer is not None:
        pieces = backend.pre_tokenizer.pre_tokenize_str(PROBE)
        for name, rule in rules.items():
            if rule.pre_tokenize_str(PROBE) == pieces:
                return name
    # Splits that differ need not show: without merges across them, the tokens are the same.
    copy = Tokenizer.from_str(json.dumps(description))
    for name, rule in rules.items():
        copy.pre_tokenizer = rule
        if _ids(copy) == _ids(backend):
            return name
    raise ExportError(
        "export gguf: the tokenizer splits text by a rule that is not one of "
        f"{', '.join(_RULES)}, whose names the format knows: choose another format"
    )


def _ids(backend: Tokenizer) -> list[int]:
    return backend.encode(PROBE, add_special_tokens=False).ids


def _add_special_tokens(writer: gguf.GGUFWriter, tokenizer: Any, size: int) -> None:
    for kind in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{kind}_token_id")
        if token is not None and token < size:
            getattr(writer, f"add_{kind}_token_id")(token)
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(full[0] == tokenizer.bos_token_id != plain[0])
    writer.add_add_eos_token(full[-1] == tokenizer.eos_token_id != plain[-1])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
