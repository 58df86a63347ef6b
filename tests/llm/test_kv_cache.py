"""The quantized KV cache: KIVI's grid, what is packed when, D7 and D8, decoding with it, generate."""

import json
import math
import struct
from itertools import pairwise
from types import SimpleNamespace

import pytest
import tiny_lm
import torch
import zoo
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import ptq_llm
import ptqcore
from ptq_llm.causal_lm import CausalLMOptions
from ptq_llm.decoding import DecodingJudge
from ptq_llm.kv_cache import KVCacheOptions, QuantizedKVCache, QuantizedKVLayer, cache_bytes, check_decodes
from ptq_llm.metrics import Judge, decode, read
from ptq_llm.packed_states import PackedStates, state_spec
from ptqcore import ArtifactError, DataError, ModelError, RecipeError
from ptqcore.plugin import discover
from ptqcore.recipe import read_recipe, validate

SMALL = KVCacheOptions(bits=4, group_size=4, residual=8)


def random_states(tokens, channels=6, batch=2, heads=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, tokens, channels, generator=generator)


def random_windows(count=3, length=40):
    return torch.randint(2, 256, (count, length), generator=torch.Generator().manual_seed(1))


def filled(options, keys, values, steps, sliding_window=None):
    """A layer that was given the tokens in steps of those lengths."""
    layer = QuantizedKVLayer(options, sliding_window)
    for part in zip(keys.split(steps, dim=2), values.split(steps, dim=2), strict=True):
        layer.update(*part)
    return layer


def held(layer):
    """Keys and values that the next token would see: the layer is given one more, of zeros."""
    like = layer.key_store.residual[:, :, :0], layer.value_store.residual[:, :, :0]
    zeros = [torch.zeros(*part.shape[:2], 1, part.shape[3]) for part in like]
    return [states[:, :, :-1] for states in layer.update(*zeros)]


def key_groups(keys, size):
    """[batch, heads, tokens, channels] as one list of tokens for each group, by explicit loops."""
    batch, heads, tokens, channels = keys.shape
    return {
        (b, h, c, t): keys[b, h, t : t + size, c]
        for b in range(batch)
        for h in range(heads)
        for c in range(channels)
        for t in range(0, tokens, size)
    }


# The grid


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_states_on_the_grid_are_exact(bits):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (2, 3, 5, 4, 8), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 2**bits - 1  # both ends of every group are there
    step = 2.0 ** torch.randint(-4, 4, (2, 3, 5, 4, 1), generator=generator)
    offset = torch.randint(-64, 64, (2, 3, 5, 4, 1), generator=generator) * step
    states = offset + codes * step
    packed = PackedStates.encode(states, state_spec(bits, 8))
    assert torch.equal(packed.codes().long(), codes)
    assert torch.equal(packed.decode(), states)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("length", [8, 16, 20, 5])  # 20 has a shorter last group, 5 only that
def test_no_state_moves_by_more_than_half_a_step_of_its_group(bits, length):
    states = random_states(7, channels=length) + 5
    found = PackedStates.encode(states, state_spec(bits, 8)).decode()
    for group, result in zip(states.split(8, -1), found.split(8, -1), strict=True):
        step = (group.amax(-1, keepdim=True) - group.amin(-1, keepdim=True)) / (2**bits - 1)
        error = (group - result).abs()
        assert (error <= step / 2 + 1e-5).all()
        assert (error > step / 4).any()


def test_the_grid_of_a_group_far_from_zero_is_as_fine_as_around_zero():
    states = random_states(4, channels=16)
    errors = [
        (PackedStates.encode(x, state_spec(4, 16)).decode() - x).abs().max() for x in (states, states + 64)
    ]
    assert errors[1] == pytest.approx(errors[0].item(), rel=0.02)


def test_equal_states_are_exact():
    states = torch.full((1, 2, 3, 8), -7.25)
    assert torch.equal(PackedStates.encode(states, state_spec(2, 4)).decode(), states)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_stays_within_half_a_step(dtype):
    states = (random_states(9, channels=16) * 3 + 40).to(dtype)
    packed = PackedStates.encode(states, state_spec(4, 8))
    found = packed.decode()
    assert found.dtype == packed.scale.dtype == packed.minimum.dtype == dtype
    exact = states.float().unflatten(-1, (2, 8))
    step = (exact.amax(-1, keepdim=True) - exact.amin(-1, keepdim=True)) / 15
    rounding = torch.finfo(dtype).eps * 45  # of the result, and of the scale 15 times over
    assert ((found.float().unflatten(-1, (2, 8)) - exact).abs() <= step / 2 + rounding).all()


def test_a_span_below_the_smallest_step_of_float16_divides_by_nothing():
    states = torch.tensor([0.0, 6e-8, 0.0, 6e-8], dtype=torch.float16).view(1, 1, 1, 4)
    packed = PackedStates.encode(states, state_spec(8, 4))
    assert not packed.codes().any()
    assert torch.equal(packed.decode(), torch.zeros_like(states))


# Keys per channel, values per token


def test_keys_have_one_grid_for_each_group_of_tokens_of_a_channel():
    keys, values = random_states(8), random_states(8, seed=1)
    store = filled(SMALL, keys, values, 1).key_store
    assert store.packed.scale.shape == (2, 3, 2, 6, 1)  # batch, heads, groups of 4 tokens, channels
    for (b, h, c, t), group in key_groups(keys, 4).items():
        at = (b, h, t // 4, c, 0)
        assert store.packed.minimum[at] == group.min()
        assert store.packed.scale[at].item() == pytest.approx((group.max() - group.min()).item() / 15)


def test_values_have_one_grid_for_each_group_of_channels_of_a_token():
    keys, values = random_states(11), random_states(11, seed=1)
    store = filled(SMALL, keys, values, 1).value_store
    assert store.packed.scale.shape == (2, 3, 3, 2)  # 11 - 8 tokens; 6 channels are groups of 4 and 2
    for token in range(3):
        for index, part in enumerate((slice(0, 4), slice(4, 6))):
            group = values[:, :, token, part]
            assert torch.equal(store.packed.minimum[:, :, token, index], group.amin(-1))
            expected = (group.amax(-1) - group.amin(-1)) / 15
            assert torch.allclose(store.packed.scale[:, :, token, index], expected)


@pytest.mark.parametrize("bits", [2, 4])
def test_keys_per_channel_are_better_than_per_token_where_one_channel_is_an_outlier(bits):
    keys, values = random_states(64, channels=16), random_states(64, channels=16)
    keys[..., 3] = keys[..., 3] + 50
    errors = {}
    for axis in ("channel", "token"):
        options = KVCacheOptions(bits=bits, group_size=16, residual=16, keys=axis)
        errors[axis] = (held(filled(options, keys, values, 1))[0] - keys).square().mean()
    # Per token the outlier sets the step: about 50 / levels, where the other channels span 4. With 2 bits
    # they all fall on one value: the error is their variance and more, not that of fine steps.
    assert errors["token"] > min(1, (45 / (2**bits - 1)) ** 2 / 12)
    assert errors["channel"] < (6 / (2**bits - 1)) ** 2 / 12


def test_keys_per_token_are_what_values_are():
    keys, values = random_states(16), random_states(16, seed=1)
    layer = filled(KVCacheOptions(bits=4, group_size=4, residual=8, keys="token"), keys, values, 1)
    expected = PackedStates.encode(keys, state_spec(4, 4))
    assert all(map(torch.equal, layer.key_store.packed.tensors(), expected.tensors()))


def test_values_may_have_another_width():
    keys, values = random_states(24, channels=16), random_states(24, channels=16, seed=1)
    layer = filled(KVCacheOptions(bits=8, values_bits=2, group_size=4, residual=8), keys, values, 1)
    assert int(layer.key_store.packed.codes().max()) == 255
    assert int(layer.value_store.packed.codes().max()) == 3


# What is packed when


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 15, 16, 17, 30])
def test_keys_are_packed_by_the_residual_and_values_beyond_it(tokens):
    keys, values = random_states(tokens), random_states(tokens, seed=1)
    layer = filled(SMALL, keys, values, 1)
    found = [(0 if s.packed is None else s.packed.words.shape[2] * s.tokens_per_row) for s in stores(layer)]
    assert found == [tokens // 8 * 8, max(tokens - 8, 0)]
    assert layer.get_seq_length() == tokens


def stores(layer):
    return layer.key_store, layer.value_store


def test_the_residual_is_untouched():
    keys, values = random_states(21), random_states(21, seed=1)
    found_keys, found_values = held(filled(SMALL, keys, values, 1))
    assert torch.equal(found_keys[:, :, 16:], keys[:, :, 16:])
    assert torch.equal(found_values[:, :, 13:], values[:, :, 13:])
    assert not torch.equal(found_keys[:, :, :16], keys[:, :, :16])
    assert not torch.equal(found_values[:, :, :13], values[:, :, :13])


def test_new_tokens_are_seen_as_they_came_and_old_ones_as_they_were_packed():
    keys, values = random_states(30), random_states(30, seed=1)
    layer = filled(SMALL, keys[:, :, :20], values[:, :, :20], 1)
    before = [store.packed.decode() for store in stores(layer)]
    seen_keys, seen_values = layer.update(keys[:, :, 20:], values[:, :, 20:])
    assert torch.equal(seen_keys[:, :, 16:], keys[:, :, 16:])
    assert torch.equal(seen_values[:, :, 12:], values[:, :, 12:])
    assert torch.equal(seen_keys[:, :, :16], before[0].transpose(-1, -2).flatten(2, 3))
    assert torch.equal(seen_values[:, :, :12], before[1])


@pytest.mark.parametrize("steps", [1, 3, 8, 20, 37, [20, *[1] * 17], [5, 30, 1, 1]])
@pytest.mark.parametrize("sliding_window", [None, 12])
def test_what_is_held_does_not_depend_on_the_steps_in_which_tokens_came(steps, sliding_window):
    keys, values = random_states(37), random_states(37, seed=1)
    expected = filled(SMALL, keys, values, 1, sliding_window)
    found = filled(SMALL, keys, values, steps, sliding_window)
    assert all(map(torch.equal, found.tensors(), expected.tensors()))
    assert len(found.tensors()) == len(expected.tensors()) == 8


def test_packed_rows_outside_the_sliding_window_are_dropped():
    keys, values = random_states(40), random_states(40, seed=1)
    layer = filled(SMALL, keys, values, 1, sliding_window=12)
    assert layer.key_store.packed.words.shape[2] == 3  # 11 old tokens lie in 3 groups of 4
    assert layer.value_store.packed.words.shape[2] == 3  # and 8 of them in the residual
    whole, sliding = filled(SMALL, keys, values, 1), held(layer)
    for found, expected in zip(sliding, held(whole), strict=True):
        assert torch.equal(found, expected[:, :, -11:])


def test_a_reordered_batch_keeps_its_codes():
    keys, values = random_states(21), random_states(21, seed=1)
    layer, beams = filled(SMALL, keys, values, 1), torch.tensor([1, 1])
    expected = [tensor[beams] for tensor in layer.tensors()]
    layer.reorder_cache(beams)
    assert all(map(torch.equal, layer.tensors(), expected))


def test_a_reset_layer_is_as_good_as_new():
    keys, values = random_states(21), random_states(21, seed=1)
    layer = filled(SMALL, random_states(30, seed=7), random_states(30, seed=8), 1)
    layer.reset()
    assert (layer.get_seq_length(), layer.tensors()) == (0, [])
    for part in zip(keys.split(1, 2), values.split(1, 2), strict=True):
        layer.update(*part)
    assert all(map(torch.equal, layer.tensors(), filled(SMALL, keys, values, 1).tensors()))


def test_d8_nothing_is_quantized_twice_and_keys_are_grouped_along_tokens(monkeypatch):
    """D8: keys quantized like values, and the whole dequantized cache again whenever the residual fills."""
    rounded, encode = {3: [], 2: []}, PackedStates.encode

    def noted(states, spec):
        rounded[spec.bits].append(states)
        return encode(states, spec)

    monkeypatch.setattr(PackedStates, "encode", noted)
    keys, values = random_states(64), random_states(64, seed=1)
    layer = QuantizedKVLayer(KVCacheOptions(bits=3, values_bits=2, group_size=4, residual=8))
    before = [None, None]
    for part in zip(keys.split(1, 2), values.split(1, 2), strict=True):
        layer.update(*part)
        for index, store in enumerate(stores(layer)):
            if before[index] is not None:
                for old, new in zip(before[index].tensors(), store.packed.tensors(), strict=True):
                    assert torch.equal(new[:, :, : old.shape[2]], old)
            before[index] = store.packed
    # All that was ever rounded: the tokens as they came, each once, keys as groups of tokens of a channel.
    assert torch.equal(torch.cat(rounded[3], dim=2), keys.unflatten(2, (16, 4)).transpose(-1, -2))
    assert torch.equal(torch.cat(rounded[2], dim=2), values[:, :, :56])


# Memory


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_a_cache_holds_packed_integers_scales_minima_and_the_residual(dtype, size):
    options = KVCacheOptions(bits=4, group_size=64, residual=64)
    keys, values = (random_states(192 + 10, channels=64, seed=seed).to(dtype) for seed in (0, 1))
    cache = SimpleNamespace(layers=[filled(options, keys, values, 50)])
    vectors = 2 * 3  # batch and heads
    packed = 64 * 4 // 8 + 2 * size  # a group of 64 in 4 bits, a scale and a minimum
    expected_keys = vectors * (3 * 64 * packed + 10 * 64 * size)
    expected_values = vectors * ((192 + 10 - 64) * packed + 64 * 64 * size)
    assert cache_bytes(cache) == expected_keys + expected_values


def test_a_full_precision_cache_is_counted_by_its_tensors():
    cache = DynamicCache()
    cache.update(random_states(10), random_states(10), 0)
    assert cache_bytes(cache) == 2 * 4 * 2 * 3 * 10 * 6


# Models


@pytest.mark.parametrize("name", zoo.NAMES)
def test_decoding_with_a_full_precision_cache_predicts_what_reading_at_once_does(name):
    model, windows = zoo.build(name), random_windows()
    with torch.no_grad():
        at_once = torch.stack([logits for logits, _ in read(model, windows, "read")], dim=1)
        cache = DynamicCache(config=model.config)
        decoded = torch.stack([logits for logits, _ in decode(model, windows, "decode", cache)])
    assert (decoded - at_once).abs().max() < 1e-4 * at_once.abs().max()


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_family_decodes_with_a_quantized_cache_and_more_bits_are_closer(name):
    model, judge = zoo.build(name), Judge(random_windows())
    judge.measure(model, "full precision", DynamicCache(config=model.config))
    found = []
    for bits in (8, 4, 2):
        options = KVCacheOptions(bits=bits, group_size=4, residual=4)
        check_decodes(model, options)
        cache = QuantizedKVCache(model.config, options)
        found.append(judge.measure(model, f"{bits} bits", cache)["kl_divergence"])
    assert 0 < found[0] < found[1] / 10 < found[2] / 10
    assert found[0] < 1e-3


def test_decoding_within_the_residual_is_exact():
    model, windows = zoo.build(), random_windows(length=20)
    judge = Judge(windows)
    expected = judge.measure(model, "full precision", DynamicCache(config=model.config))
    cache = QuantizedKVCache(model.config, KVCacheOptions(bits=2, group_size=4, residual=20))
    assert judge.measure(model, "quantized", cache) == expected


def test_the_decoding_judge_takes_the_first_model_with_a_full_precision_cache_as_reference():
    model, windows = zoo.build(), random_windows()
    judge = DecodingJudge(windows, model.config, SMALL)
    before, after = judge.measure(model, "before"), judge.measure(model, "after")
    assert before.keys() == after.keys()
    assert (before["decode_kl_divergence"], before["decode_top1_agreement"]) == (0, 1)
    assert before["decode_perplexity"] == pytest.approx(
        Judge(windows).measure(model, "")["perplexity"], 1e-5
    )
    assert after["decode_kl_divergence"] > 0
    # 3 layers, keys and values, 2 heads of 16 channels, float32
    assert before["kv_cache_bytes_per_token"] == 3 * 2 * 2 * 16 * 4
    assert after["kv_cache_bytes_per_token"] < before["kv_cache_bytes_per_token"]


def test_padding_before_a_shorter_prompt_does_not_show():
    model, (short, long) = zoo.build(), random_windows(2, 30)
    padded = torch.stack([torch.cat([torch.full((10,), zoo.END), short[:20]]), long])
    mask = torch.ones_like(padded)
    mask[0, :10] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = []
    for tokens, seen, places in (
        (padded, mask, positions),
        (short[None, :20], mask[:1, 10:], positions[:1, 10:]),
    ):
        cache = QuantizedKVCache(model.config, KVCacheOptions(bits=8, group_size=4, residual=4))
        with torch.no_grad():
            for at in range(tokens.shape[1]):
                now = slice(at, at + 1)
                found = model(
                    tokens[:, now],
                    attention_mask=seen[:, : at + 1],
                    position_ids=places[:, now],
                    past_key_values=cache,
                ).logits
        logits.append(found[0, -1])
    assert (logits[0] - logits[1]).abs().max() < 0.02 * logits[1].abs().max()


PROMPT = {"do_sample": False, "pad_token_id": zoo.END, "min_new_tokens": 20, "max_new_tokens": 20}


@torch.no_grad()
def written_by_hand(model, prompt, options):
    """The most likely tokens, one after the other: the prompt at once, the rest one by one."""
    cache, tokens, new = QuantizedKVCache(model.config, options), prompt, prompt
    for _ in range(20):
        logits = model(input_ids=new, past_key_values=cache).logits[:, -1]
        logits[:, zoo.END] = -math.inf
        new = logits.argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, new], dim=1)
    return tokens


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3"])
def test_generate_writes_what_a_loop_by_hand_writes(name):
    model, prompt = zoo.build(name), random_windows(2, 20)
    cache = QuantizedKVCache(model.config, SMALL)
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **PROMPT)
    assert torch.equal(found, written_by_hand(model, prompt, SMALL))
    assert cache.layers[1].key_store.packed is not None


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_within_the_residual_writes_what_full_precision_writes(beams):
    model, prompt = zoo.build(), random_windows(2, 20)
    common = PROMPT | {"num_beams": beams, "attention_mask": torch.ones_like(prompt)}
    cache = QuantizedKVCache(model.config, KVCacheOptions(bits=2, group_size=4, residual=40))
    assert torch.equal(
        model.generate(prompt, past_key_values=cache, **common), model.generate(prompt, **common)
    )


def test_beams_are_scored_as_each_would_be_alone():
    """A cache whose codes did not follow their beams would give other scores."""
    model, prompt = zoo.build(), random_windows(1, 20)
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=QuantizedKVCache(model.config, SMALL),
        num_beams=4,
        num_return_sequences=4,
        return_dict_in_generate=True,
        output_scores=True,
        **PROMPT,
    )
    for tokens, score in zip(found.sequences, found.sequences_scores, strict=True):
        cache, new, total = QuantizedKVCache(model.config, SMALL), prompt, 0.0
        for following in tokens[20:]:
            with torch.no_grad():
                logits = model(input_ids=new, past_key_values=cache).logits[0, -1]
            total += logits.log_softmax(-1)[following].item()
            new = following.view(1, 1)
        assert score.item() == pytest.approx(total / 20, rel=1e-4)


# Refusals


@pytest.mark.parametrize("kind", ["mamba", "jamba", "deepseek_v32"])
def test_a_model_that_keeps_something_else_is_refused(kind):
    with pytest.raises(ModelError, match=r"keeps a \w+ beside or instead of plain keys and values: set"):
        QuantizedKVCache(AutoConfig.for_model(kind), SMALL)


def test_a_model_that_does_not_use_the_cache_is_refused():
    config = AutoConfig.for_model("openai-gpt", n_embd=32, n_layer=2, n_head=2, vocab_size=64)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match="GPTLMHeadModel does not decode with a cache of keys and values"):
        check_decodes(model, SMALL)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"bits": 9}, "'task.kv_cache.bits' is 9"),
        ({"resdual": 64}, "'task.kv_cache.resdual' is unknown; did you mean 'residual'"),
        ({"keys": "head"}, "'task.kv_cache.keys' is 'head'"),
        ({"group_size": 48}, "residual 128 is not a multiple of group_size 48"),
    ],
)
def test_wrong_keys_are_refused_in_one_sentence(wrong, sentence):
    with pytest.raises(RecipeError, match=sentence):
        validate(CausalLMOptions, {"kv_cache": wrong}, "task")


def test_keys_per_token_leave_the_residual_one_by_one_whatever_the_group():
    assert KVCacheOptions(keys="token", residual=100, group_size=64).residual == 100


# A run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The shipped recipe `kv4`, made small, on a tiny model; and the same without a quantized cache."""
    base = tmp_path_factory.mktemp("run")
    model = tiny_lm.save(base / "model")
    text = tiny_lm.write_text(base / "text.txt", 600)
    calibration = tiny_lm.write_text(base / "calibration.txt", 400, seed=1)
    small = [
        f"task.model={model}",
        f"task.text={text}",
        f"task.calibration={calibration}",
        "task.window=48",
        "task.max_windows=8",
        "task.calibration_window=32",
        "task.calibration_samples=2",
    ]
    quantized = ["task.kv_cache.residual=8", "task.kv_cache.group_size=8", "task.decode_windows=3"]
    file = discover().recipe_file("kv4", "llm")
    with_cache, without = base / "with", base / "without"
    return SimpleNamespace(
        folder=with_cache,
        record=ptqcore.quantize(read_recipe(file, [*small, *quantized]), "llm", with_cache),
        without=ptqcore.quantize(read_recipe(file, [*small, "task.kv_cache=null"]), "llm", without),
        windows=torch.tensor(tiny_lm.tokenizer()(text.read_text())["input_ids"])[: 8 * 48].view(8, 48),
        small=small,
        file=file,
    )


def test_a_run_measures_by_decoding_with_the_cache(run):
    before, after = run.record.before, run.record.after
    own = {"decode_perplexity", "decode_kl_divergence", "decode_top1_agreement", "kv_cache_bytes_per_token"}
    assert before.keys() == after.keys() == run.without.after.keys() | own
    assert not own & run.without.after.keys()
    model = ptqcore.load(run.folder)
    reference, found = tiny_lm.build(), Judge(run.windows[:3])
    found.measure(reference, "reference", DynamicCache(config=reference.config))
    expected = found.measure(model, "again", ptq_llm.new_cache(run.folder))
    assert after["decode_perplexity"] == expected["perplexity"]
    assert after["decode_kl_divergence"] == expected["kl_divergence"] > 0
    assert json.loads((run.folder / "metrics.json").read_text())["after"] == after


def test_decode_perplexity_is_that_of_tokens_fed_one_by_one(run):
    """By hand: no judge, one window after the other."""
    model, losses = ptqcore.load(run.folder), []
    for window in run.windows[:3]:
        cache = ptq_llm.new_cache(run.folder)
        with torch.no_grad():
            for token, following in pairwise(window):
                logits = model(token.view(1, 1), past_key_values=cache, use_cache=True).logits[0, -1]
                losses.append(-logits.double().log_softmax(-1)[following].item())
    expected = math.exp(sum(losses) / len(losses))
    assert run.record.after["decode_perplexity"] == pytest.approx(expected, rel=1e-4)


def test_d7_perplexity_is_that_of_the_model_without_a_quantized_cache(run):
    """D7: what was called "without KV quantization" was measured with it."""
    for name in ("perplexity", "kl_divergence", "top1_agreement"):
        assert run.record.after[name] == run.without.after[name]
        assert run.record.before[name] == run.without.before[name]
    assert run.record.after["decode_kl_divergence"] > 3 * run.record.after["kl_divergence"]


def test_the_metrics_say_what_a_token_takes_in_the_cache(run):
    # 3 layers of 2 heads of 16 channels; 47 tokens are read, of which 40 keys and 39 values are packed.
    assert run.record.before["kv_cache_bytes_per_token"] == 3 * 2 * 2 * 16 * 4
    keys = 40 // 8 * 16 * (4 + 4 + 4) + 7 * 16 * 4  # a group of 8 in 4 bits is one word
    values = 39 * (8 + 2 * (4 + 4)) + 8 * 16 * 4
    assert run.record.after["kv_cache_bytes_per_token"] == pytest.approx(3 * 2 * (keys + values) / 47)


def test_the_artifact_and_its_export_say_which_cache_to_use(run):
    model, prompt = ptqcore.load(run.folder), run.windows[:2, :20]
    exported = AutoModelForCausalLM.from_pretrained(run.folder / "exports/compressed-tensors")
    written = []
    for folder, chosen in ((run.folder, model), (run.folder / "exports/compressed-tensors", exported)):
        cache = ptq_llm.new_cache(folder)
        assert cache.layers[0].options == KVCacheOptions(bits=4, group_size=8, residual=8)
        written.append(
            chosen.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=cache,
                max_new_tokens=12,
                do_sample=False,
                pad_token_id=zoo.END,
            )
        )
        assert cache.get_seq_length() == 31
        assert cache.layers[0].key_store.packed.words.shape[2] == 3
    assert torch.equal(*written)


def test_a_run_without_a_quantized_cache_has_no_settings_of_one(run):
    folder = run.folder.parent / "without"
    assert not (folder / "assets" / "kv_cache.json").exists()
    with pytest.raises(
        ArtifactError, match=r"has no kv_cache\.json: give the folder of a run whose recipe"
    ):
        ptq_llm.new_cache(folder)


@pytest.mark.parametrize(
    "content", ["{", '{"bits": 99}', '{"bit": 4}', struct.pack("<I", 0x80FF).decode("latin1")]
)
def test_damaged_settings_are_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "kv_cache.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"the KV cache of .* cannot be read") as caught:
        ptq_llm.new_cache(tmp_path)
    assert "\n" not in str(caught.value)


def test_windows_within_the_residual_are_refused_before_the_work_begins(run, tmp_path):
    recipe = read_recipe(run.file, [*run.small, "task.kv_cache.residual=64"])
    with pytest.raises(DataError, match=r"task\.window is 48, but task\.kv_cache\.residual .* 66 or more"):
        ptqcore.quantize(recipe, "llm", tmp_path / "out")
