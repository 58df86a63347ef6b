"""Which tensors are put on a grid: the rules, network by network.

Edges are written as `owner:function`, `>n` for a further output, and `<n` for a tensor that is
rounded where it is read.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ptqcore.dataflow import trace
from ptqcore.modules import quantizable_layers
from ptqcore.placement import find_edges

IMAGE = (1, 3, 8, 8)


class Net(nn.Module):
    """Some layers, and any function of them as the forward pass."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.compute = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs):
        return self.compute(self, *inputs)


def conv(inputs=4, outputs=4, size=3):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


def placed(model, *inputs, without=()):
    """The edges of a model whose layers, but for some, are all to be quantized."""
    inputs = inputs or (torch.randn(IMAGE),)
    flow = trace(model.eval(), lambda: model(*inputs))
    return [str(edge) for edge in find_edges(flow, set(quantizable_layers(model)) - set(without))]


def placed_in(forward, *inputs, without=(), **layers):
    return placed(Net(forward, **layers), *inputs, without=without)


def body(forward, **layers):
    """The edges behind the stem `a`, a convolution of the image, in front of the convolution `z`."""
    found = placed_in(lambda m, x: m.z(forward(m, m.a(x))), a=conv(3), z=conv(), **layers)
    assert found[0] == "a:conv2d<0"
    assert found[-1] == "z:conv2d"
    return found[1:-1]


# Layers and the activation functions behind them


def test_the_image_is_rounded_where_it_is_read_and_what_a_convolution_makes_where_it_is_made():
    assert placed(nn.Sequential(conv(3))) == ["0:conv2d<0", "0:conv2d"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [(nn.ReLU(), "relu"), (nn.ReLU(inplace=True), "relu"), (nn.ReLU6(), "clamp"), (nn.Hardtanh(), "clamp")],
)
def test_a_convolution_is_rounded_behind_the_function_that_clips_it(kind, name):
    assert placed(nn.Sequential(conv(3), kind, conv())) == ["0:conv2d<0", f"1:{name}", "2:conv2d"]


def test_it_is_so_at_the_end_of_a_network_too():
    assert placed(nn.Sequential(conv(3), nn.ReLU())) == ["0:conv2d<0", "1:relu"]
    assert placed_in(lambda m, x: F.relu6(m.a(x)), a=conv(3)) == ["a:conv2d<0", ":relu6"]


def test_a_smooth_activation_function_computes_in_floating_point_between_two_grids():
    model = nn.Sequential(conv(3), nn.SiLU(), conv())
    assert placed(model) == ["0:conv2d<0", "0:conv2d", "1:silu", "2:conv2d"]


def test_a_convolution_that_others_read_too_is_on_a_grid_which_relu_keeps():
    def forward(m, x):
        y = m.a(x)
        return m.b(y.relu()), y.sigmoid()

    found = placed_in(forward, a=conv(3), b=conv())
    assert found == ["a:conv2d<0", "a:conv2d", "b:conv2d"]


def test_linear_layers_read_from_a_grid_but_the_outputs_of_a_network_are_in_floating_point():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert placed(model, torch.randn(2, 4)) == ["0:linear<0", "1:relu"]


def test_transposed_convolutions_are_convolutions():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2), nn.ReLU(), conv())
    assert placed(model) == ["0:conv_transpose2d<0", "1:relu", "2:conv2d"]


def test_a_layer_left_out_computes_in_floating_point():
    model = nn.Sequential(conv(3), nn.ReLU(), conv(), nn.ReLU(), conv())
    assert placed(model, without=["2"]) == ["0:conv2d<0", "1:relu", "3:relu", "4:conv2d"]
    assert placed(model, without=["0", "2", "4"]) == []


def test_functions_with_weights_that_belong_to_no_layer_are_left_in_floating_point():
    def forward(m, x):
        return F.linear(F.conv2d(x, torch.ones(4, 3, 1, 1)).mean((2, 3)), torch.ones(2, 4))

    assert placed_in(forward, idle=conv()) == []


def test_every_reader_of_the_image_rounds_it():
    found = placed_in(lambda m, x: (m.a(x), m.b(x)), a=conv(3), b=conv(3))
    assert found == ["a:conv2d<0", "a:conv2d", "b:conv2d<0", "b:conv2d"]


def test_every_input_of_the_model_has_an_edge_of_its_own():
    found = placed_in(lambda m, x, y: m.a(x) + m.b(y), torch.ones(1, 4), torch.ones(1, 4), **linears("ab"))
    assert found == ["a:linear<0", "b:linear<0"]


def test_each_call_of_a_shared_head_has_edges_of_its_own():
    def forward(m, x):
        return m.head(m.a(x)), m.head(m.b(x))

    found = placed_in(forward, a=conv(3), b=conv(3), head=conv())
    heads = ["head:conv2d", "head#1:conv2d"]
    assert found == ["a:conv2d<0", "a:conv2d", heads[0], "b:conv2d<0", "b:conv2d", heads[1]]


# Sums, products, concatenations


def test_both_inputs_of_a_residual_sum_are_on_a_grid_and_so_is_the_sum():
    assert body(lambda m, x: x + m.b(x), b=conv()) == ["a:conv2d", "b:conv2d", ":add"]


def test_a_sum_is_rounded_behind_its_relu():
    assert body(lambda m, x: (x + m.b(x)).relu(), b=conv()) == ["a:conv2d", "b:conv2d", ":relu"]


def test_a_sum_that_is_scaled_by_one_is_a_sum():
    found = body(lambda m, x: (x + m.b(x)) / 1.0, b=conv())
    assert found == ["a:conv2d", "b:conv2d", ":add"]
    assert body(lambda m, x: (x + m.b(x)) / 2.0, b=conv()) == ["a:conv2d", "b:conv2d", ":div"]


def test_a_sum_in_place_is_a_sum():
    def forward(m, x):
        y = m.b(x)
        y += x
        return y.relu_()

    assert body(forward, b=conv()) == ["a:conv2d", "b:conv2d", ":relu"]


def test_a_sum_at_the_output_is_left_in_floating_point():
    found = placed_in(lambda m, x: m.a(x) + x, a=conv(3, 3))
    assert found == ["a:conv2d<0", "a:conv2d"]


def test_the_image_is_rounded_by_the_sum_that_reads_it():
    found = placed_in(lambda m, x: m.z(x + m.a(x)), a=conv(3, 3), z=conv(3))
    assert found == ["a:conv2d<0", "a:conv2d", ":add<0", ":add", "z:conv2d"]


def test_a_sum_with_a_constant_is_left_in_floating_point():
    assert body(lambda m, x: x.relu() + 1) == [":relu", ":add"]


def test_a_tensor_added_to_itself_is_one_tensor_on_a_grid():
    assert body(lambda m, x: x + x) == ["a:conv2d", ":add"]


def test_a_concatenation_has_a_grid_and_so_have_its_parts():
    found = placed_in(
        lambda m, x: m.z(torch.cat([m.a(x), m.b(x).relu()], 1)), a=conv(3), b=conv(3), z=conv(8)
    )
    assert found == ["a:conv2d<0", "a:conv2d", "b:conv2d<0", ":relu", ":cat", "z:conv2d"]


def test_squeeze_and_excitation_multiplies_on_grids():
    def forward(m, x):
        gate = m.up(m.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x * gate

    found = body(forward, down=conv(4, 2, 1), up=conv(2, 4, 1))
    assert found == ["a:conv2d", ":mean", ":relu", "up:conv2d", ":sigmoid", ":mul"]


def linears(names, width=4):
    return {name: nn.Linear(width, width) for name in names}


def test_attention_multiplies_on_grids_and_its_softmax_is_in_floating_point():
    def forward(m, x):
        weights = (m.q(x) @ m.k(x).mT * 0.5).softmax(-1)
        return m.o(weights @ m.v(x))

    found = placed_in(forward, torch.randn(1, 5, 4), **linears("qkvo"))
    reads = ["q:linear<0", "k:linear<0", "v:linear<0"]
    made = ["q:linear", "k:linear", ":softmax", "v:linear", ":matmul.1"]
    assert sorted(found) == sorted([*reads, *made])


def test_a_product_with_a_constant_matrix_is_left_in_floating_point():
    found = placed_in(lambda m, x: m.b(m.a(x) @ torch.eye(4)), torch.randn(2, 4), **linears("ab"))
    assert found == ["a:linear<0", ":matmul"]


def test_a_product_of_a_tensor_with_itself_has_two_factors():
    found = placed_in(lambda m, x: m.b(torch.matmul(y := m.a(x), y)), torch.randn(4, 4), **linears("ab"))
    assert found == ["a:linear<0", "a:linear", ":matmul"]


def test_what_is_added_to_a_product_is_left_in_floating_point():
    def forward(m, x, mask):
        return m.b(torch.baddbmm(mask + 1, m.a(x), x.mT))

    found = placed_in(forward, torch.randn(1, 4, 4), torch.randn(1, 4, 4), **linears("ab"))
    assert found == ["a:linear<0", "a:linear", ":mT<0", ":baddbmm"]


# Pooling, resizing, and functions that only move values


@pytest.mark.parametrize(
    "move",
    [
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.pad(x, (1, 1, 1, 1)),
        lambda x: F.pad(x, (1, 1), value=0),
        lambda x: F.interpolate(x, scale_factor=2),
        lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
        lambda x: x[:, :, 1:],
        lambda x: x.transpose(2, 3).contiguous(),
        lambda x: x.permute(0, 1, 3, 2),
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: x.chunk(2, 2)[1],
        lambda x: nn.Identity()(x),
        lambda x: x.view(1, 4, 4, 16),
        lambda x: x / 1,
        lambda x: x * 1.0,
    ],
)
def test_what_only_moves_values_keeps_the_grid_of_its_input(move):
    assert body(lambda m, x: move(x)) == ["a:conv2d"]
    assert body(lambda m, x: move(x.relu())) == [":relu"]


@pytest.mark.parametrize("value", [1, 0.5, -1.0])
def test_padding_with_what_need_not_be_on_the_grid_is_no_move(value):
    assert body(lambda m, x: F.pad(x, (1, 1), value=value)) == ["a:conv2d", ":pad"]


def test_what_moves_the_image_rounds_it():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    assert placed(model) == ["0:flatten<0"]


@pytest.mark.parametrize(
    ("average", "name"),
    [
        (lambda x: F.avg_pool2d(x, 2), "avg_pool2d"),
        (lambda x: F.adaptive_avg_pool2d(x, 2), "adaptive_avg_pool2d"),
        (lambda x: x.mean((2, 3), keepdim=True), "mean"),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), "interpolate"),
        (lambda x: F.interpolate(x, (4, 4), mode="bilinear", align_corners=True), "interpolate"),
    ],
)
def test_averages_read_from_a_grid_and_make_one(average, name):
    assert body(lambda m, x: average(x)) == ["a:conv2d", f":{name}"]
    assert body(lambda m, x: average(x.relu())) == [":relu", f":{name}"]


def test_an_average_at_the_output_is_left_in_floating_point():
    model = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.AdaptiveAvgPool2d(1))
    assert placed(model, torch.randn(1, 2, 3, 4)) == ["0:linear<0"]


def test_the_head_of_a_classifier_reads_the_pooled_tensor():
    model = nn.Sequential(conv(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert placed(model) == ["0:conv2d<0", "1:relu", "2:adaptive_avg_pool2d"]


def test_parts_of_one_tensor_share_its_grid():
    def forward(m, x):
        left, right = m.a(x).chunk(2, 1)
        return m.b(left), m.c(right)

    found = placed_in(forward, a=conv(3), b=conv(2), c=conv(2))
    assert found == ["a:conv2d<0", "a:conv2d", "b:conv2d", "c:conv2d"]


def test_relu_of_the_image_is_on_a_grid_even_if_others_read_the_image():
    found = placed_in(lambda m, x: (m.a(x.relu()), x.sigmoid()), a=conv(3))
    assert found == [":relu", "a:conv2d"]


def test_what_does_not_depend_on_the_inputs_has_no_edge():
    found = placed_in(lambda m, x: m.a(x) + m.b(torch.ones(1, 4)), torch.ones(1, 4), **linears("ab"))
    assert found == ["a:linear<0"]


def test_whole_numbers_have_no_grid():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    assert placed(model, torch.tensor([[1, 2]])) == ["0:embedding"]


def test_a_tensor_written_in_part_is_rounded_once_it_is_whole():
    def forward(m, x):
        x[:, 0] = 0
        return x

    assert body(forward) == ["a:conv2d", ":setitem"]
