"""PyTorch's attention modules with layers inside: the same function, and every weight can be quantized."""

import pytest
import torch
from torch import nn

from ptqcore import split_attention
from ptqcore.dataflow import trace
from ptqcore.decompositions import in_steps
from ptqcore.modules import quantizable_layers
from ptqcore.placement import find_edges


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Holds(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)
        for weight in self.attention.parameters():
            nn.init.normal_(weight, std=0.4)

    def forward(self, *given, **options):
        return self.attention(*given, **options)


def pair(**options):
    """A module, and the same one split."""
    plain = Holds(**options).eval().requires_grad_(False)
    split = Holds(**options).eval().requires_grad_(False)
    split.load_state_dict(plain.state_dict())
    assert split_attention(split) == ["attention"]
    return plain, split


CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
CALLS = {
    "plain": {},
    "without weights": {"need_weights": False},
    "weights of every head": {"average_attn_weights": False},
    "bool mask": {"attn_mask": CAUSAL},
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "float mask": {"attn_mask": torch.linspace(-1, 1, 25).view(5, 5)},
    "mask of every head": {"attn_mask": torch.linspace(-1, 1, 150).view(6, 5, 5)},
    "padding": {"key_padding_mask": PADDING},
    "padding and mask": {"key_padding_mask": PADDING, "attn_mask": CAUSAL, "need_weights": False},
    "float padding": {"key_padding_mask": torch.linspace(-1, 1, 15).view(3, 5)},
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_it_computes_the_same(call, batch_first):
    plain, split = pair(batch_first=batch_first)
    given = [torch.randn(3, 5, 8) if batch_first else torch.randn(5, 3, 8) for _ in range(3)]
    for found, expected in zip(split(*given, **CALLS[call]), plain(*given, **CALLS[call]), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [{"bias": False}, {"kdim": 6, "vdim": 4}, {"kdim": 6, "bias": False}])
def test_so_do_modules_without_bias_and_of_other_widths(options):
    plain, split = pair(batch_first=True, **options)
    module = plain.attention
    given = torch.randn(2, 5, 8), torch.randn(2, 7, module.kdim), torch.randn(2, 7, module.vdim)
    torch.testing.assert_close(split(*given), plain(*given))


@pytest.mark.parametrize("options", [{}, {"key_padding_mask": PADDING[1], "need_weights": False}])
def test_so_does_one_sample_without_a_batch(options):
    plain, split = pair()
    x = torch.randn(5, 8)
    torch.testing.assert_close(split(x, x, x, **options), plain(x, x, x, **options))


def test_its_weights_are_layers_and_its_products_are_on_grids():
    _, split = pair(batch_first=True)
    paths = [f"attention.{name}" for name in ("query", "key", "value", "output")]
    assert list(quantizable_layers(split)) == paths
    x = torch.randn(2, 5, 8)
    flow = trace(split, in_steps(lambda: split(x, x, x, need_weights=False)))
    edges = [str(edge) for edge in find_edges(flow, set(paths)) if edge.side == "output"]
    assert edges == [*(f"{path}:linear" for path in paths[:3]), "attention:softmax", "attention:matmul.1"]


def test_what_adds_keys_and_what_is_a_subclass_stays():
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleList([nn.MultiheadAttention(8, 2, add_bias_kv=True), Own(8, 2)])
    model.append(nn.MultiheadAttention(8, 2, add_zero_attn=True))
    assert split_attention(model) == []


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_transformer_with_split_attention_computes_the_same(norm_first, padded):
    model = nn.Transformer(8, 2, 2, 2, 16, dropout=0.1, batch_first=True, norm_first=norm_first)
    model.eval().requires_grad_(False)
    given = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    options = {"src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING} if padded else {}
    expected = model(*given, tgt_mask=CAUSAL, **options)
    assert len(split_attention(model)) == 6
    torch.testing.assert_close(model(*given, tgt_mask=CAUSAL, **options), expected)
    assert len(quantizable_layers(model)) == 6 * 4 + 4 * 2
