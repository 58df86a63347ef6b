"""Functions that hide products: the same values in single steps, each of which can be seen and rounded."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ptqcore.dataflow import trace
from ptqcore.decompositions import attention, decomposed, in_steps
from ptqcore.edges import ActivationQuantizers, applying
from ptqcore.grids import make_grids
from ptqcore.modules import QuantLinear, quantizable_layers, replace_module
from ptqcore.packed import QuantizedTensor
from ptqcore.placement import find_edges
from ptqcore.recipe import QuantSection, TensorQuant
from ptqcore.spec import QuantSpec


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def factors(queries=5, keys=7, heads=4, key_heads=4):
    return (
        torch.randn(2, heads, queries, 8),
        torch.randn(2, key_heads, keys, 8),
        torch.randn(2, key_heads, keys, 6),
    )


def bool_mask():
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[2] = False  # a query that sees nothing
    return mask


def float_mask():
    mask = torch.randn(2, 1, 5, 7, generator=torch.Generator().manual_seed(1))
    mask[0, 0, 1] = -math.inf
    mask[1, 0, 3, 2:] = -math.inf
    return mask


class Computes(nn.Module):
    """Any function as a forward pass."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def ops_of(model, *inputs):
    return trace(model, in_steps(lambda: model(*inputs))).ops


def names(model, *inputs):
    return [op.name for op in ops_of(model, *inputs)]


# Attention


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_mask": bool_mask()},
        {"attn_mask": float_mask()},
        {"attn_mask": torch.zeros(5, 7, dtype=torch.bool)},
        {"is_causal": True},
        {"scale": 0.3},
        {"scale": 2, "attn_mask": bool_mask()},
    ],
    ids=["plain", "bool mask", "float mask", "sees nothing", "causal", "scale", "scale and mask"],
)
def test_attention_in_steps_is_attention(options):
    found = attention(*factors(), **options)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(*factors_again(), **options))


def factors_again():
    torch.manual_seed(0)
    return factors()


@settings(deadline=None, max_examples=30)
@given(
    queries=st.integers(1, 6),
    keys=st.integers(1, 6),
    groups=st.sampled_from([1, 2, 4]),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_so_for_all_shapes_and_shared_heads(queries, keys, groups, causal, seed):
    torch.manual_seed(seed)
    given = factors(queries, keys, 4, 4 // groups)
    options = {"enable_gqa": True, "is_causal": causal}
    torch.testing.assert_close(
        attention(*given, **options), F.scaled_dot_product_attention(*given, **options)
    )


def test_a_query_that_sees_nothing_gets_zeros():
    found = attention(*factors(), attn_mask=bool_mask())
    assert not found[:, :, 2].any()
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_stay_what_they_are(dtype):
    given = [x.to(dtype) for x in factors()]
    found = attention(*given)
    assert found.dtype == dtype
    torch.testing.assert_close(found, F.scaled_dot_product_attention(*given))


def test_products_of_half_precision_do_not_overflow():
    large = [300 * torch.ones(1, 1, 2, 8, dtype=torch.float16)] * 3
    assert attention(*large).tolist() == F.scaled_dot_product_attention(*large).tolist()


def test_dropout_is_done_to_the_softmax():
    ones = torch.ones(1, 1, 2, 4)
    torch.manual_seed(3)
    found = attention(ones, ones, ones, dropout_p=0.5)
    torch.manual_seed(3)
    expected = F.dropout(torch.full((1, 1, 2, 2), 0.5), 0.5) @ ones
    assert torch.equal(found, expected)


def test_its_steps_are_seen_where_it_was_one_function():
    model = Computes(F.scaled_dot_product_attention)
    assert [op.name for op in trace(model, lambda: model(*factors())).ops] == [
        "scaled_dot_product_attention"
    ]
    assert names(model, *factors()) == ["transpose", "matmul", "mul", "softmax", "matmul"]


def test_outside_of_the_context_nothing_is_changed():
    model, given = Computes(F.scaled_dot_product_attention), factors()
    with decomposed():
        inside = model(*given)
    torch.testing.assert_close(inside, model(*given))
    assert torch.overrides._len_torch_function_stack() == 0


# PyTorch's attention module


MASKS = {
    "none": {},
    "causal": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(5)},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 8, "vdim": 6}],
    ids=["sequence first", "batch first", "extra keys", "other widths"],
)
def test_the_products_of_an_attention_module_are_seen(mask, need_weights, options):
    module = nn.MultiheadAttention(8, 2, **options).eval().requires_grad_(False)
    shape = (2, 5) if options.get("batch_first") else (5, 2)
    given = [torch.randn(*shape, width) for width in (8, module.kdim, module.vdim)]
    model = Computes(lambda *x: module(*x, need_weights=need_weights, **MASKS[mask])[0])
    ops = ops_of(model, *given)
    products = [op for op in ops if op.name in {"matmul", "baddbmm"}]
    assert len(products) == 2
    assert sum(op.name == "softmax" for op in ops) == 1
    torch.testing.assert_close(in_steps(lambda: model(*given))(), model(*given))


def test_a_transformer_layer_is_seen_whole_and_computes_the_same():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(2, 5, 8)
    found = [str(op.site) for op in ops_of(layer, x) if op.name in {"matmul", "softmax", "linear"}]
    assert found == [
        "self_attn:linear",
        "self_attn:matmul",
        "self_attn:softmax",
        "self_attn:matmul.1",
        "self_attn:linear.1",
        "linear1:linear",
        "linear2:linear",
    ]
    torch.testing.assert_close(in_steps(lambda: layer(x))(), layer(x))


@pytest.mark.parametrize("mask", [None, torch.tensor([[False] * 5, [False] * 3 + [True] * 2])])
def test_no_fast_path_passes_over_quantized_layers(mask):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0)
    model = nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)
    for path, linear in quantizable_layers(model).items():
        spec, weight = QuantSpec(), linear.weight.detach()
        quantized = QuantLinear(linear, spec, QuantSpec(bits=2, symmetric=False, dynamic=True))
        low, high = weight.min().view(1, 1), weight.max().view(1, 1)
        quantized.set_weight(QuantizedTensor.from_range(weight, low, high, spec))
        replace_module(model, path, quantized.eval())
    calls = []
    for module in model.modules():
        if isinstance(module, QuantLinear):
            compute = module.forward
            module.forward = lambda x, compute=compute: (calls.append(x), compute(x))[1]
    model(torch.randn(2, 5, 8), src_key_padding_mask=mask)
    assert len(calls) == 4


# Products as equations


EQUATIONS = [
    "bhid,bhjd->bhij",
    "bhij,bhjd->bihd",
    "bid, bjd -> bij",
    "ij,kj->ik",
    "ijk,k->ij",
    "nchw,kc->nkhw",
    "bcq,bckl->bqkl",
    "i,ji->j",
    "aij,aij->a",
]
OTHERS = [
    "ij,jk",
    "ij,ij->ij",
    "i,j->ij",
    "ii,ij->j",
    "ij,kl->il",
    "...ij,...jk->...ik",
    "ij,jk,kl->il",
    "ij->ji",
]
SIZES = {"a": 2, "b": 2, "c": 3, "d": 6, "h": 3, "i": 4, "j": 5, "k": 4, "l": 2, "n": 2, "q": 7, "w": 3}


def operands(equation):
    terms = equation.replace(" ", "").replace("...", "b").partition("->")[0].split(",")
    return [torch.randn([SIZES[name] for name in term]) for term in terms]


@pytest.mark.parametrize("equation", EQUATIONS)
def test_an_equation_of_two_factors_is_a_matrix_product(equation):
    given = operands(equation)
    model = Computes(lambda *x: torch.einsum(equation, *x))
    assert names(model, *given).count("matmul") == 1
    found = in_steps(lambda: model(*given))()
    torch.testing.assert_close(found, torch.einsum(equation, *given))


@pytest.mark.parametrize("equation", OTHERS)
def test_other_equations_are_left_alone(equation):
    given = operands(equation)
    model = Computes(lambda *x: torch.einsum(equation, *x))
    assert names(model, *given) == ["einsum"]
    torch.testing.assert_close(in_steps(lambda: model(*given))(), torch.einsum(equation, *given))


def test_factors_that_are_repeated_or_given_as_a_list_are_understood():
    model = Computes(lambda x, y: torch.einsum("ij,jk->ik", [x, y]))
    assert "matmul" in names(model, torch.randn(2, 3), torch.randn(3, 4))
    repeated = torch.randn(2, 1), torch.randn(3, 4)
    assert names(model, *repeated) == ["einsum"]


# Rounded at the products


class Attends(nn.Module):
    """Attention of two heads, in one function or written out."""

    def __init__(self, fused=True, **options):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.fused, self.options = fused, options

    def forward(self, x, round_to=lambda name, x: x):
        q, k, v = (round_to(n, getattr(self, n)(round_to("x", x))) for n in "qkv")
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (q, k, v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, **self.options)
        else:
            y = round_to("shares", (q @ k.mT * 0.5).softmax(-1)) @ v
        return self.o(round_to("y", y).transpose(1, 2).flatten(2))


DATAFLOW = QuantSection(
    weights=TensorQuant(bits=8, granularity="channel"),
    activations=TensorQuant(bits=4, symmetric=False),
    scope="dataflow",
)


def test_queries_keys_shares_and_values_are_rounded():
    model, x = Attends().requires_grad_(False), torch.randn(2, 5, 8)
    flow = trace(model, in_steps(lambda: model(x)))
    edges = find_edges(flow, set(quantizable_layers(model)))
    reads, made = [str(e) for e in edges if e.side == "input"], [e for e in edges if e.side == "output"]
    assert reads == ["q:linear<0", "k:linear<0", "v:linear<0"]
    assert [str(edge) for edge in made] == ["q:linear", "k:linear", "v:linear", ":softmax", ":matmul.1"]
    grids = make_grids(DATAFLOW, flow, set(quantizable_layers(model)))
    assert {quant.bits for quant in grids.edges.values()} == {4}


def test_it_is_what_quantizers_in_the_single_steps_make():
    model, x = Attends().requires_grad_(False), torch.randn(2, 5, 8)
    by_hand = Attends(fused=False).requires_grad_(False)
    by_hand.load_state_dict(model.state_dict())
    flow = trace(model, in_steps(lambda: model(x)))
    edges = find_edges(flow, set("qkvo"))
    found = ActivationQuantizers(dict.fromkeys(edges, QuantSpec(bits=3, symmetric=False)))
    for number, edge in enumerate(edges):
        found[edge].set_range(torch.tensor(-1.0 + (number > 5)), torch.tensor(1.0))
    places = {"x": edges[0], **dict(zip(["q", "k", "v", "shares", "y"], edges[3:], strict=True))}
    expected = by_hand(x, lambda name, y: found[places[name]](y))
    with applying(model, "", found.functions()):
        assert torch.equal(model(x), expected)
    found.attach(model)
    assert torch.equal(model(x), expected)
    assert not torch.equal(by_hand(x), expected)


def test_a_causal_softmax_is_rounded_as_it_is_and_a_masked_one_behind_its_mask():
    x, mask = torch.randn(2, 5, 8), torch.ones(5, 5, dtype=torch.bool).tril()
    for options, place in (({"is_causal": True}, ":softmax"), ({"attn_mask": mask}, ":masked_fill.1")):
        model = Attends(**options).requires_grad_(False)
        flow = trace(model, in_steps(lambda model=model: model(x)))
        assert place in [str(edge) for edge in find_edges(flow, set("qkvo"))]


def test_a_mask_that_is_added_to_a_product_is_not_rounded():
    module = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(False)

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.last = module, nn.Linear(8, 8)

        def forward(self, x, padding):
            return self.last(self.attention(x, x, x, key_padding_mask=padding)[0])

    model, padding = Padded().eval(), torch.tensor([[False] * 4 + [True]] * 2)
    flow = trace(model, in_steps(lambda: model(torch.randn(2, 5, 8), padding)))
    edges = [str(edge) for edge in find_edges(flow, {"last"})]
    assert edges == ["attention:linear", "attention:mul", "attention:softmax", "attention:linear.1"]
