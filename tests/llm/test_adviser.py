"""The calibration adviser: divergence of token distributions, and tokens per input channel."""

import math

import pytest
import tiny_lm
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq_llm import adviser
from ptq_llm.adviser import distribution, input_channels, kl_divergence, rank, too_few_tokens
from ptq_llm.unify import unify

tokens = st.lists(st.integers(0, 9), min_size=1, max_size=60).map(torch.tensor)


# Distributions


def test_distribution_is_counts_mixed_with_the_uniform_one():
    """Four tokens of a vocabulary of 5, λ = 0.1: 0.9 nᵢ/4 + 0.1/5."""
    found = distribution(torch.tensor([0, 0, 0, 3]), 5, uniform_share=0.1)
    expected = [0.9 * 3 / 4 + 0.02, 0.02, 0.02, 0.9 / 4 + 0.02, 0.02]
    assert found.tolist() == pytest.approx(expected, abs=1e-15)


@given(tokens)
def test_distribution_sums_to_one_and_has_no_zeros(text):
    found = distribution(text, 10)
    assert float(found.sum()) == pytest.approx(1, abs=1e-12)
    assert float(found.min()) >= adviser.UNIFORM_SHARE / 10 - 1e-15


@given(tokens)
def test_a_text_repeated_has_the_same_distribution(text):
    torch.testing.assert_close(distribution(text.repeat(3), 10), distribution(text, 10))


# Divergence


def test_divergence_of_two_coins_is_the_closed_form():
    p, q = 0.3, 0.8
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    found = kl_divergence(torch.tensor([p, 1 - p]).double(), torch.tensor([q, 1 - q]).double())
    assert found == pytest.approx(expected, rel=1e-6)


def test_divergence_of_texts_without_a_common_token_is_the_smoothing_alone():
    """Of two tokens each text has one: KL = (1 − λ) ln((2 − λ) / λ)."""
    share = adviser.UNIFORM_SHARE
    (found,) = rank(torch.tensor([0, 0, 0]), {"other": torch.tensor([1])}, 2)
    assert found.divergence == pytest.approx((1 - share) * math.log((2 - share) / share), rel=1e-12)
    assert found.unseen == 1.0


@given(tokens, tokens)
def test_divergence_is_positive_and_zero_for_the_text_itself(text, corpus):
    found = {one.name: one for one in rank(text, {"same": text, "other": corpus}, 10)}
    assert found["same"].divergence == pytest.approx(0, abs=1e-12)
    assert found["other"].divergence >= -1e-12


def test_divergence_is_from_the_text_to_the_corpus():
    """A corpus that has more than the text costs little; one that lacks half of the text costs much."""
    narrow, wide = torch.tensor([0] * 8), torch.tensor([0, 1] * 4)
    (missing,) = rank(wide, {"narrow": narrow}, 2)
    (beside,) = rank(narrow, {"wide": wide}, 2)
    assert missing.divergence > 2 * beside.divergence
    assert (missing.unseen, beside.unseen) == (0.5, 0.0)


@settings(max_examples=20)
@given(st.integers(1, 9))
def test_corpora_are_ranked_by_how_much_of_the_text_is_mixed_with_others(shift):
    text = torch.arange(10).repeat(5)
    corpora = {f"{n} others": torch.cat([text, torch.full((n,), shift)]) for n in (40, 5, 200, 0)}
    assert [one.name for one in rank(text, corpora, 10)] == [
        "0 others",
        "5 others",
        "40 others",
        "200 others",
    ]


# Tokens per input channel


@pytest.mark.parametrize(("tokens", "channels"), [(4 * 576, 576), (6144, 1536), (10**6, 64)])
def test_four_tokens_per_channel_are_enough(tokens, channels):
    assert too_few_tokens(tokens, channels) is None


def test_fewer_are_a_warning_that_says_how_many_it_takes():
    sentence = too_few_tokens(4096, 1536)
    assert sentence.startswith(
        "4096 calibration tokens are 2.7 for each of 1536 input channels: below about 4"
    )
    assert "GPTQ over-fits; raise task.calibration_samples or task.calibration_window" in sentence
    assert sentence.endswith("to 6144 tokens or more")
    assert "singular" not in sentence


def test_fewer_than_channels_make_the_gram_singular():
    """Its rank is at most the number of tokens."""
    x = torch.randn(15, 16, generator=torch.Generator().manual_seed(0))
    assert int(torch.linalg.matrix_rank(x.T @ x)) == 15
    assert "the Gram of its inputs is singular" in too_few_tokens(15, 16)
    assert "singular" not in too_few_tokens(16, 16)


def test_input_channels_are_those_of_the_linear_layers():
    expected: dict[int, set[str]] = {}
    for path, layer in tiny_lm.build().named_modules():
        if isinstance(layer, torch.nn.Linear):
            expected.setdefault(layer.in_features, set()).add(path.rpartition(".")[2])
    found = input_channels(tiny_lm.build().config)
    assert {channels: set(kinds) for channels, kinds in found.items()} == expected
    assert list(found) == [64, 128]
    assert found[128] == ["down_proj"]


@pytest.mark.parametrize("family", ["gpt2", "falcon_old", "phi3", "mixtral", "qwen3_moe"])
def test_input_channels_are_known_of_layers_of_every_kind(family):
    """Transposed layers, subclasses, fused ones and parameters of all experts: what they become."""
    model = zoo.build(family)
    found = input_channels(model.config)
    unify(model)
    linears = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    assert set(found) == {layer.in_features for layer in linears}
    assert any("of each expert" in kind for kinds in found.values() for kind in kinds) == (
        family in ("mixtral", "qwen3_moe")
    )


@pytest.mark.parametrize(
    ("windows", "window", "available", "expected"),
    [(8, 512, None, 4096), (8, 512, 10**6, 4096), (8, 512, 1600, 1536), (8, 512, 511, 0)],
)
def test_calibration_reads_whole_windows_as_far_as_there_are_any(windows, window, available, expected):
    assert adviser.calibration_tokens(windows, window, available) == expected


# The command


@pytest.fixture
def files(tmp_path):
    """A model without weights, and texts of letters and of digits."""
    tiny_lm.save(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "mine.txt").write_text("abba " * 100)
    (tmp_path / "letters.txt").write_text("baba abc " * 100)
    (tmp_path / "digits.txt").write_text("0123456789 " * 100)
    return tmp_path


SMALL = ("--set", "task.calibration_samples=4", "--set", "task.calibration_window=32")


def advise(files, *corpora):
    named = [argument for corpus in corpora for argument in ("--corpus", files / corpus)]
    return ("llm", "advise", "--model", files / "model", "--text", files / "mine.txt", *named, *SMALL)


def test_the_command_ranks_corpora_without_the_weights_of_the_model(ptq, files):
    code, out, err = ptq(*advise(files, "digits.txt", "letters.txt"))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == [
        str(files / "letters.txt"),
        str(files / "digits.txt"),
    ]
    assert lines[2].split()[2:] == ["0.0", "%", "900"]
    assert lines[3].split()[2:] == ["80.0", "%", "1100"]
    mine, letters = ([*(files / name).read_bytes()] for name in ("mine.txt", "letters.txt"))
    (expected,) = rank(torch.tensor(mine), {"letters": torch.tensor(letters)}, tiny_lm.VOCABULARY)
    assert float(lines[2].split()[1]) == pytest.approx(expected.divergence, abs=1e-4)


def test_the_command_warns_of_too_few_tokens(ptq, files):
    _, out, _ = ptq(*advise(files, "letters.txt"))
    assert f"on {files / 'letters.txt'}, calibration reads 128 tokens:" in out
    assert "  1 for each of 128 input channels of down_proj" in out
    assert out.splitlines()[-2:] == [f"warning: {too_few_tokens(128, channels)}" for channels in (64, 128)]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda files: (files / "mine.txt").unlink(),
            "mine.txt' cannot be read as UTF-8 text: No such file",
        ),
        (lambda files: (files / "letters.txt").write_text(""), "letters.txt' holds no tokens"),
        (lambda files: (files / "model" / "config.json").unlink(), "has no config.json"),
    ],
    ids=["no text", "an empty corpus", "no model"],
)
def test_what_cannot_be_read_is_one_sentence(ptq, files, change, sentence):
    change(files)
    code, out, err = ptq(*advise(files, "letters.txt"))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert sentence in err
    assert err.count("\n") == 1
