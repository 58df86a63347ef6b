"""What every reader of files from strangers rests on: bounded text, JSON, YAML and headers of tensors."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ptqcore import ModelError, parse_json, read_bytes, read_json, read_tensor_header
from ptqcore.memory_limit import limited_memory
from ptqcore.reading import one_sentence, plain_size
from ptqcore.weights import check_config, read_weights
from ptqcore.yaml_text import parse_yaml

GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def header(folder: Path, entries: object, data: int = 24, length: int | None = None) -> Path:
    """A safetensors file with these entries."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(data))
    return file


# Text


def test_a_file_larger_than_allowed_is_not_read(tmp_path):
    file = tmp_path / "large"
    file.write_bytes(b"x" * 11)
    assert read_bytes(file, 11) == b"x" * 11
    with pytest.raises(ValueError, match="'large' has 11 bytes, it may have 10 at most"):
        read_bytes(file, 10)


def test_a_file_without_an_end_is_not_read():
    with pytest.raises(ValueError, match="'zero' is no plain file"):
        read_bytes(Path("/dev/zero"))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="'pipe' is no plain file"):
        plain_size(tmp_path / "pipe")


@pytest.mark.parametrize("text", ["[" * 101 + "]" * 101, '{"a":' * 101 + "1" + "}" * 101, "[" * 10**6])
def test_json_nested_too_deeply_is_refused(text):
    with pytest.raises(ValueError, match=r"nested more than 100 deep|Expecting value"):
        parse_json(text)


def test_json_as_deep_as_allowed_is_read():
    assert parse_json("[" * 100 + "]" * 100)[0] is not None


@given(st.one_of(st.binary(max_size=200), st.integers().map(lambda number: b"[%d]" % number)))
def test_any_bytes_are_json_or_a_value_error(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_bytes(content)
    try:
        value = read_json(file)
    except ValueError:
        return
    assert repr(value) == repr(json.loads(content.decode("utf-8")))


# YAML


def test_an_alias_is_refused_before_it_is_expanded():
    bomb = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
    )
    with pytest.raises(ValueError, match=r"the alias \*a is not read here: write out what it stands for"):
        parse_yaml(bomb)
    with pytest.raises(ValueError, match="the alias"):
        parse_yaml("a: &a {<<: *a}")


def test_yaml_nested_too_deeply_is_refused():
    assert parse_yaml("[" * 100 + "]" * 100) is not None
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        parse_yaml("[" * 5000 + "]" * 5000)


def test_yaml_runs_nothing():
    with pytest.raises(ValueError, match="could not determine a constructor for the tag"):
        parse_yaml("!!python/object/apply:os.system [exit]")


@given(st.text(alphabet="ab:-[]{}&*!<>?|'\"#%,.\n 019", max_size=60))
def test_any_text_is_yaml_or_a_value_error_of_one_line(text):
    try:
        parse_yaml(text)
    except ValueError as error:
        lines = str(error).splitlines()
    else:
        return
    assert len(lines) <= 1


# Headers of tensors


def test_a_header_says_where_tensors_lie(tmp_path):
    file = tmp_path / "good.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0, 4)}, file)
    found = read_tensor_header(file)
    a = found["a"]
    assert (a.dtype, a.shape, a.elements, a.nbytes) == ("F32", (2, 3), 6, 24)
    assert file.read_bytes()[a.start : a.end] == torch.arange(6.0).numpy().tobytes()
    assert found["b"].elements == 0


def entry(**changes: object) -> dict[str, object]:
    return {"a": GOOD["a"] | changes}


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ([], "its header is no JSON object"),
        (b"{", "Expecting property name"),
        ({"a": []}, "tensor 'a' needs a dtype, a shape and two data_offsets"),
        (entry(shape=[2, -3]), "tensor 'a' needs a dtype, a shape and two data_offsets"),
        (entry(shape=[2.0, 3]), "tensor 'a' needs a dtype, a shape and two data_offsets"),
        (entry(shape=[True, 6]), "tensor 'a' needs a dtype, a shape and two data_offsets"),
        (entry(shape=[2**63, 3]), "tensor 'a' needs a dtype, a shape and two data_offsets"),
        (entry(data_offsets=[0]), "tensor 'a' needs a dtype, a shape and two data_offsets"),
        (entry(dtype="F31"), "tensor 'a' has the type 'F31', which is none of"),
        (entry(data_offsets=[0, 10**12]), "outside of the file"),
        (entry(data_offsets=[24, 0]), "outside of the file"),
        (
            entry(shape=[10**6, 10**6]),
            r"of shape \[1000000, 1000000\] needs 4000000000000 bytes, but has 24",
        ),
        (
            entry(shape=[10**12, 0], data_offsets=[0, 0]),
            r"has the shape \[1000000000000, 0\], and no elements",
        ),
        (GOOD | {"b": GOOD["a"]}, "tensors 'a' and 'b' share bytes"),
        (
            GOOD | {"b": {"dtype": "U8", "shape": [1], "data_offsets": [23, 24]}},
            "tensors 'a' and 'b' share",
        ),
    ],
)
def test_headers_that_claim_what_the_file_cannot_hold(tmp_path, entries, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_tensor_header(header(tmp_path, entries))


@pytest.mark.parametrize("length", [0, 2**20, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file(tmp_path, length):
    with pytest.raises(ValueError, match=r"its header has \d+ bytes, in a file of|Expecting value"):
        read_tensor_header(header(tmp_path, GOOD, length=length))


@given(st.binary(max_size=120), st.integers(0, 130))
def test_any_bytes_are_a_header_or_a_value_error(tmp_path_factory, text, length):
    file = header(tmp_path_factory.getbasetemp(), text, 0, length)
    try:
        found = read_tensor_header(file)
    except ValueError:
        return
    assert found.keys() <= json.loads(file.read_bytes()[8:][:length]).keys()


# Weights in a folder


def test_an_index_may_not_lead_out_of_its_folder(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for place in ("../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..\\a.safetensors", 3):
        index.write_text(json.dumps({"weight_map": {"a": place}}))
        with pytest.raises(ValueError, match=r"index\.json names .*: weights lie right inside the folder"):
            read_weights(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="has no weight_map"):
        read_weights(tmp_path)


def test_the_weights_of_a_folder_are_counted(tmp_path):
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(4), "c": torch.zeros(1)}, tmp_path / "two.safetensors")
    found = read_weights(tmp_path)
    assert (found.numbers, found.tensors) == (11, 3)
    (tmp_path / "two.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"two\.safetensors: its header has"):
        read_weights(tmp_path)


def test_a_configuration_has_no_sizes_beyond_its_weights():
    check_config({"hidden_size": 4096, "rope_theta": 10**8, "max_position_embeddings": 10**7}, 1000)
    check_config({"hidden_size": 2**21}, 2**22)
    for wrong in (
        {"hidden_size": 2**21},
        {"text_config": {"num_layers": 4097}},
        {"widths": [8, 10**9]},
    ):
        with pytest.raises(
            ValueError, match=r"the configuration has \w+ -?\d+, but the weights have 1000 bytes"
        ):
            check_config(wrong, 1000)
    with pytest.raises(ValueError, match="the configuration is no JSON object"):
        check_config([], 1000)


# Memory


@pytest.mark.parametrize(
    "build",
    [
        lambda: torch.nn.Linear(10**5, 10**5),
        lambda: torch.zeros(10**11),
        lambda: torch.full((10**10,), 1.0),
        lambda: torch.arange(10**5)[:, None] * torch.arange(10**5),
        lambda: torch.zeros(10).repeat(10**9),
        lambda: torch.zeros(10).expand(10**9, 10).contiguous(),
        lambda: torch.kron(torch.ones(3000, 3000), torch.ones(300, 300)),
        lambda: [torch.zeros(2**20) for _ in range(40)],
    ],
)
def test_memory_beyond_the_limit_is_refused_before_it_is_taken(build):
    refused = pytest.raises(ModelError, match="x describes far larger layers than it holds numbers for")
    with refused, limited_memory(1000, 2, "x"):
        build()


def test_more_layers_than_tensors_are_refused():
    refused = pytest.raises(ModelError, match="x describes far more layers than it holds tensors for")
    with refused, limited_memory(1000, 2, "x"):
        torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(10**6))


def test_what_fits_is_built_as_without_a_limit():
    torch.manual_seed(0)
    free = torch.nn.TransformerEncoderLayer(32, 4)
    torch.manual_seed(0)
    with limited_memory(10**5, 20, "x"):
        bound = torch.nn.TransformerEncoderLayer(32, 4)
        torch.nn.Linear(10**6, 10**6, device="meta")  # takes no memory
    assert all(map(torch.equal, free.state_dict().values(), bound.state_dict().values()))


# One sentence


@pytest.mark.parametrize(
    "error", [KeyError("a"), RecursionError(), MemoryError("a\nb"), ZeroDivisionError()]
)
def test_what_a_parser_raises_becomes_one_sentence(error):
    with (
        pytest.raises(ModelError, match=r"^file cannot be read: .+$") as caught,
        one_sentence("file cannot be read", ModelError),
    ):
        raise error
    assert "\n" not in str(caught.value)


def test_our_own_sentences_stay_as_they_are():
    with pytest.raises(ModelError, match=r"^as it is$"), one_sentence("label", ModelError):
        raise ModelError("as it is")


def test_names_from_a_file_do_not_break_a_sentence():
    assert str(ModelError("no layer 'a\nb'\r\n")) == "no layer 'a b'"
