"""The task `causal-lm`: windows, self-written text, and metrics against explicit loops."""

import math
from types import SimpleNamespace
from typing import ClassVar

import pytest
import tiny_lm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ptq_llm import metrics, text
from ptq_llm.causal_lm import CausalLM, CausalLMOptions
from ptq_llm.metrics import Judge
from ptqcore import DataError, RecipeError
from ptqcore.recipe import validate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_lm.save(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def model(folder):
    return tiny_lm.build(num_hidden_layers=2)


def perturbed(by: float = 0.02):
    model = tiny_lm.build(num_hidden_layers=2)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return model


def random_windows(count=5, length=24):
    return torch.randint(0, tiny_lm.VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def task(folder, workspace, seed=0, **options):
    workspace.mkdir(exist_ok=True)
    defaults = {"window": 16, "calibration_window": 16, "calibration_samples": 3, "max_windows": 4}
    return CausalLM(CausalLMOptions(model=str(folder), **(defaults | options)), seed, workspace)


# Metrics


def reference_perplexity(model, windows):
    losses = []
    with torch.no_grad():
        for window in windows:
            logits = model(window[None]).logits[0]
            for position in range(1, len(window)):
                losses.append(F.cross_entropy(logits[position - 1].double(), window[position]).item())
    return math.exp(sum(losses) / len(losses))


def log_probabilities(model, windows):
    """In double precision, [positions, vocabulary], all but the last position of every window."""
    with torch.no_grad():
        return torch.cat(
            [model(window[None]).logits[0, :-1].double().log_softmax(-1) for window in windows]
        )


def divergences(reference, other, windows):
    """KL(reference ‖ other) of every position, in double precision."""
    p, q = log_probabilities(reference, windows), log_probabilities(other, windows)
    return (p.exp() * (p - q)).sum(-1)


def test_perplexity_is_exp_of_the_mean_cross_entropy_of_all_but_the_first_tokens(model):
    windows = random_windows()
    judge, other = Judge(windows), perturbed()
    found = judge.measure(model, "first")["perplexity"]
    assert found == pytest.approx(reference_perplexity(model, windows), rel=1e-6)
    found = judge.measure(other, "second")["perplexity"]
    assert found == pytest.approx(reference_perplexity(other, windows), rel=1e-6)


def test_the_perplexity_of_a_uniform_model_is_the_size_of_its_vocabulary():
    def uniform(input_ids, use_cache):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 50))

    found = Judge(torch.randint(0, 50, (3, 9))).measure(uniform, "uniform")
    assert found["perplexity"] == pytest.approx(50, rel=1e-6)


def test_the_reference_agrees_with_itself(model):
    judge = Judge(random_windows())
    for label in ("before", "again"):
        found = judge.measure(model, label)
        assert found["kl_divergence"] == 0.0
        assert found["top1_agreement"] == 1.0


def test_kl_divergence_is_its_definition_in_double_precision(model):
    windows, other = random_windows(), perturbed()
    judge = Judge(windows)
    judge.measure(model, "before")
    expected = divergences(model, other, windows).mean().item()
    assert expected > 0.01
    assert judge.measure(other, "after")["kl_divergence"] == pytest.approx(expected, rel=1e-4)


def test_kl_divergence_is_of_the_reference_to_the_model_not_the_other_way_round(model):
    windows, sharper = random_windows(), tiny_lm.build(num_hidden_layers=2)
    with torch.no_grad():
        sharper.lm_head.weight.mul_(2)
    there, back = divergences(model, sharper, windows).mean(), divergences(sharper, model, windows).mean()
    assert there > 1.1 * back
    judge = Judge(windows)
    judge.measure(model, "before")
    assert judge.measure(sharper, "after")["kl_divergence"] == pytest.approx(there.item(), rel=1e-4)


def test_top1_agreement_is_the_share_of_equal_most_likely_tokens(model):
    windows, other = random_windows(), perturbed(0.05)
    judge = Judge(windows)
    judge.measure(model, "before")
    found = judge.measure(other, "after")["top1_agreement"]
    best = [log_probabilities(m, windows).argmax(-1) for m in (model, other)]
    assert found == (best[0] == best[1]).double().mean().item()
    assert 0 < found < 1


@pytest.mark.parametrize("stride", [2, 3, 7, 24, 1000])
def test_with_too_many_positions_every_nth_of_all_windows_is_compared(model, monkeypatch, stride):
    windows, other = random_windows(), perturbed()
    positions = 5 * 23
    monkeypatch.setattr(metrics, "_MOST_KEPT_VALUES", -(-positions * tiny_lm.VOCABULARY // stride))
    judge = Judge(windows)
    judge.measure(model, "before")
    expected = divergences(model, other, windows)[::stride]
    found = judge.measure(other, "after")
    assert found["kl_divergence"] == pytest.approx(expected.mean().item(), rel=1e-4)
    assert sum(len(kept) for kept in judge._reference_log) == len(expected)
    assert found["perplexity"] == pytest.approx(reference_perplexity(other, windows), rel=1e-6)


def test_no_more_log_probabilities_are_kept_than_allowed(model, monkeypatch):
    monkeypatch.setattr(metrics, "_MOST_KEPT_VALUES", 10_000)
    judge = Judge(random_windows(7, 31))
    judge.measure(model, "before")
    kept = sum(part.numel() for part in judge._reference_log)
    assert 5_000 < kept <= 10_000


# Windows


def test_windows_are_cut_from_the_start_and_a_shorter_rest_is_dropped():
    assert text.windows(torch.arange(11), 4, None, "a text").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert text.windows(torch.arange(11), 4, 1, "a text").tolist() == [[0, 1, 2, 3]]
    assert text.windows(torch.arange(8), 4, 9, "a text").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert text.windows(torch.arange(4), 4, None, "a text").tolist() == [[0, 1, 2, 3]]


def test_a_text_shorter_than_one_window_is_refused():
    with pytest.raises(DataError, match="a text holds 3 tokens, fewer than one window of 4"):
        text.windows(torch.arange(3), 4, None, "a text")


def test_spread_windows_reach_from_the_first_to_the_last():
    spread = text.spread_windows(torch.arange(45), 4, 3, "a text")
    assert spread[:, 0].tolist() == [0, 20, 40]
    assert spread.shape == (3, 4)


def test_spread_windows_are_distinct_and_all_of_them_if_there_are_fewer():
    for count in range(1, 12):
        spread = text.spread_windows(torch.arange(40), 4, count, "a text")
        starts = spread[:, 0].tolist()
        assert len(set(starts)) == min(count, 10)
        assert starts == sorted(starts)


# Texts of the user


def test_tokens_of_a_file_are_its_bytes_in_order(folder, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("Grüße", encoding="utf-8")
    tokenizer = tiny_lm.tokenizer()
    tokens = text.read_tokens(str(file), "task.text", tokenizer)
    assert len(tokens) == 7
    assert tokenizer.decode(tokens) == "Grüße"


def test_evaluation_uses_the_first_windows_of_the_text(folder, model, tmp_path):
    file = tiny_lm.write_text(tmp_path / "text.txt", 200)
    job = task(folder, tmp_path / "work", text=str(file), window=16, max_windows=3)
    found = job.evaluate(job.load_model())["perplexity"]
    tokens = text.read_tokens(str(file), "task.text", tiny_lm.tokenizer())
    assert found == pytest.approx(reference_perplexity(model, tokens[:48].view(3, 16)), rel=1e-6)


def test_without_a_limit_every_window_of_the_text_is_evaluated(folder, model, tmp_path):
    file = tiny_lm.write_text(tmp_path / "text.txt", 200)
    job = task(folder, tmp_path / "work", text=str(file), window=16, max_windows=None)
    found = job.evaluate(job.load_model())["perplexity"]
    tokens = text.read_tokens(str(file), "task.text", tiny_lm.tokenizer())
    assert found == pytest.approx(reference_perplexity(model, tokens[:192].view(12, 16)), rel=1e-6)


def test_calibration_samples_are_spread_over_the_text(folder, tmp_path):
    file = tiny_lm.write_text(tmp_path / "text.txt", 11 * 16 + 5)
    job = task(folder, tmp_path / "work", calibration=str(file))
    samples = job.samples(job.load_model())
    tokens = text.read_tokens(str(file), "task.calibration", tiny_lm.tokenizer())
    found = [sample["input_ids"] for sample in samples]
    assert all(sample["use_cache"] is False for sample in samples)
    for window, start in zip(found, (0, 5 * 16, 10 * 16), strict=True):
        assert torch.equal(window, tokens[None, start : start + 16])


@pytest.mark.parametrize("key", ["text", "calibration"])
def test_a_text_of_three_tokens_is_refused_before_anything_is_computed(folder, tmp_path, key):
    file = tmp_path / "short.txt"
    file.write_text("abc")
    with pytest.raises(DataError, match=rf"task\.{key} .*short\.txt.* holds 3 tokens"):
        task(folder, tmp_path / "work", **{key: str(file)}).load_model()


@pytest.mark.parametrize("key", ["window", "calibration_window"])
def test_a_window_longer_than_the_model_has_positions_is_refused(folder, tmp_path, key):
    with pytest.raises(DataError, match=rf"task\.{key} is 257, but the model has 256 positions"):
        task(folder, tmp_path / "work", **{key: 257}).load_model()
    task(folder, tmp_path / "work", **{key: 256}).load_model()


@pytest.mark.parametrize(
    ("key", "value"),
    [("window", 1), ("calibration_samples", 0), ("max_windows", 0), ("dtype", "int8"), ("windw", 16)],
)
def test_an_impossible_option_is_refused(key, value):
    with pytest.raises(RecipeError, match=f"task.{key}"):
        validate(CausalLMOptions, {key: value}, "task")


def test_tokens_that_the_model_does_not_know_are_refused(folder, tmp_path):
    small = tiny_lm.save(tmp_path / "small", num_hidden_layers=1, vocab_size=60, pad_token_id=None)
    file = tiny_lm.write_text(tmp_path / "text.txt", 200)
    with pytest.raises(DataError, match=r"task\.text"):
        task(small, tmp_path / "work", text=str(file)).load_model()


# Text that the model writes itself


def test_the_same_seed_writes_the_same_tokens_and_another_seed_others(model):
    first, again, other = (text.write(model, [tiny_lm.END], 3, 12, seed) for seed in (0, 0, 1))
    assert first.shape == (3, 12)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def test_writing_leaves_the_random_numbers_of_others_alone(model):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    text.write(model, [tiny_lm.END], 2, 5, 0)
    assert torch.equal(torch.rand(4), expected)


def test_special_tokens_are_never_written(model):
    ordinary = [7, 11, 13, 101, 200]
    special = [token for token in range(tiny_lm.VOCABULARY + 3) if token not in ordinary]
    written = text.write(model, special, 8, 40, 0)
    assert set(written.flatten().tolist()) == set(ordinary)


def test_tokens_follow_the_distribution_of_the_model():
    """A model that forbids all but the next token writes the alphabet."""

    def next_letter(input_ids, past_key_values, use_cache):
        logits = torch.full((*input_ids.shape, 30), -100.0)
        logits.scatter_(-1, (input_ids[..., None] + 1) % 30, 100.0)
        return SimpleNamespace(logits=logits, past_key_values=None)

    next_letter.get_input_embeddings = lambda: SimpleNamespace(num_embeddings=30)
    written = text.write(next_letter, [], 4, 20, 0)
    assert torch.equal(written[:, 1:], (written[:, :-1] + 1) % 30)


def test_the_cache_gives_the_distribution_of_the_whole_prefix(model):
    """Greedy writing by hand, without a cache, finds the same tokens when sampling has no choice."""
    sharp = tiny_lm.build(num_hidden_layers=2)
    with torch.no_grad():
        sharp.lm_head.weight.mul_(1e4)
    written = text.write(sharp, [tiny_lm.END], 2, 10, 0)
    with torch.no_grad():
        logits = sharp(written).logits
    logits[..., tiny_lm.END] = -torch.inf
    assert torch.equal(logits[:, :-1].argmax(-1), written[:, 1:])


def test_written_text_is_kept_in_the_workspace(folder, tmp_path, monkeypatch):
    first = task(folder, tmp_path / "work")
    expected = first.samples(first.load_model())
    monkeypatch.setattr(text, "write", lambda *_: pytest.fail("written again"))
    again = task(folder, tmp_path / "work")
    found = again.samples(again.load_model())
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(expected, found, strict=True))


def test_another_seed_does_not_find_the_written_text_of_the_first(folder, tmp_path):
    samples = []
    for seed in (0, 1):
        job = task(folder, tmp_path / "work", seed=seed)
        samples.append(torch.cat([sample["input_ids"] for sample in job.samples(job.load_model())]))
    assert not torch.equal(*samples)


class Spy:
    """Notes the windows that a judge is made with."""

    windows = None
    reference: ClassVar = {}

    def __init__(self, windows, store):
        Spy.windows = windows

    def measure(self, model, label):
        return {}


@pytest.mark.parametrize(("window", "calibration_window"), [(16, 16), (20, 12), (12, 20)])
def test_self_written_calibration_and_evaluation_do_not_overlap(
    folder, tmp_path, monkeypatch, window, calibration_window
):
    monkeypatch.setattr("ptq_llm.causal_lm.Judge", Spy)
    job = task(folder, tmp_path / "work", window=window, calibration_window=calibration_window)
    model = job.load_model()
    calibration = torch.cat([sample["input_ids"] for sample in job.samples(model)])
    job.evaluate(model)
    assert calibration.shape == (3, calibration_window)
    assert Spy.windows.shape == (4, window)
    (file,) = (tmp_path / "work").glob("written-*")
    written = load_file(file)["tokens"]
    assert torch.equal(calibration, written[:3, :calibration_window])
    assert torch.equal(Spy.windows, written[3:, :window])


@pytest.mark.parametrize(("limit", "count"), [(3, 3), (8, 8), (32, 8), (None, 8)])
def test_at_most_eight_written_windows_are_evaluated(folder, tmp_path, monkeypatch, limit, count):
    monkeypatch.setattr("ptq_llm.causal_lm.Judge", Spy)
    job = task(folder, tmp_path / "work", max_windows=limit)
    job.evaluate(job.load_model())
    assert Spy.windows.shape == (count, 16)


def test_only_what_is_not_given_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ptq_llm.causal_lm.Judge", Spy)
    file = tiny_lm.write_text(tmp_path / "text.txt", 200)
    job = task(folder, tmp_path / "first", calibration=str(file))
    job.evaluate(job.load_model())
    assert Spy.windows.shape == (4, 16)
    (written,) = (tmp_path / "first").glob("written-*")
    assert load_file(written)["tokens"].shape == (4, 16)
    job = task(folder, tmp_path / "second", text=str(file))
    job.samples(job.load_model())
    (written,) = (tmp_path / "second").glob("written-*")
    assert load_file(written)["tokens"].shape == (3, 16)
    job = task(folder, tmp_path / "third", text=str(file), calibration=str(file))
    model = job.load_model()
    job.samples(model)
    job.evaluate(model)
    assert not list((tmp_path / "third").glob("written-*"))


# The rest of the contract


def test_the_head_is_excluded_and_nothing_else(folder, tmp_path):
    job = task(folder, tmp_path / "work")
    assert job.excluded(job.load_model()) == {"lm_head": "output head"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_saved_assets_build_the_structure_of_the_model(folder, tmp_path, dtype):
    job = task(folder, tmp_path / "work", dtype=dtype)
    model = job.load_model()
    job.save_assets(tmp_path / "assets")
    built = CausalLM.build(tmp_path / "assets")
    ours, theirs = (
        {name: (tensor.shape, tensor.dtype) for name, tensor in m.state_dict().items()}
        for m in (model, built)
    )
    assert ours == theirs
    assert not built.training
