"""Functions of the tensors at edges: the same as if they were written into the model by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ptqcore.dataflow import Site, trace
from ptqcore.edges import ATTRIBUTE, ActivationQuantizers, applying, detached, quantizers_of
from ptqcore.modules import quantizable_layers
from ptqcore.placement import Edge, find_edges
from ptqcore.quantizers import FakeQuant
from ptqcore.spec import QuantSpec

SPEC = QuantSpec(bits=4, symmetric=False)


class Residual(nn.Module):
    """conv(relu(conv(x) + conv(relu(conv(x))))); `q` is called with the name and value of each tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

    def forward(self, x, q=lambda name, tensor: tensor):
        y = self.a(q("image", x))
        y = q("relu", F.relu(y))
        y = q("b", self.b(y))
        y = y + q("c", self.c(q("image again", x)))
        return q("d", self.d(q("sum", y.relu())))


def edge(text, side="output", index=0):
    """`owner:function`, or `owner#call:function.ordinal`."""
    owner, _, function = text.partition(":")
    owner, _, call = owner.partition("#")
    name, _, ordinal = function.partition(".")
    return Edge(Site(owner, int(call or 0), name, int(ordinal or 0)), side, index)


PLACES = {
    "image": edge("a:conv2d", "input"),
    "relu": edge(":relu"),
    "b": edge("b:conv2d"),
    "image again": edge("c:conv2d", "input"),
    "c": edge("c:conv2d"),
    "sum": edge(":relu.1"),
    "d": edge("d:conv2d"),
}


def quantizer(low=-1.0, high=2.0, spec=SPEC):
    made = FakeQuant(spec)
    made.set_range(torch.tensor(low), torch.tensor(high))
    return made


def quantizers():
    """A different one for every tensor of the residual network."""
    return {name: quantizer(-0.5 - number, 1.0 + number) for number, name in enumerate(PLACES)}


def attached(model, specs=None):
    """The model with quantizers at the edges that it needs, and the list of them."""
    if specs is None:
        flow = trace(model, lambda: model(torch.ones(1, 3, 6, 6)))
        specs = dict.fromkeys(find_edges(flow, set(quantizable_layers(model))), SPEC)
    found = ActivationQuantizers(specs)
    for number, place in enumerate(found.names):
        found[place].set_range(torch.tensor(-1.0 - number), torch.tensor(1.5 + number))
    found.attach(model)
    return found


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def model():
    return Residual().eval().requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(2, 3, 6, 6)


# Applied for a while


def test_what_hooks_of_layers_compute_takes_no_place_of_the_model_around_them(model, x):
    made = quantizers()
    functions = {place: made[name] for name, place in PLACES.items()}
    with applying(model, "", functions):
        expected = model(x)
    seen = []
    handle = model.a.register_forward_hook(lambda layer, args, output: seen.append(F.relu(output)))
    with applying(model, "", functions):
        assert torch.equal(model(x), expected)
    handle.remove()
    torch.testing.assert_close(seen, [F.relu(model.a(made["image"](x)))], rtol=0, atol=0)


def test_quantizers_at_edges_are_those_written_into_the_model_by_hand(model, x):
    made = quantizers()
    expected = model(x, lambda name, tensor: made[name](tensor))
    with applying(model, "", {place: made[name] for name, place in PLACES.items()}):
        found = model(x)
    assert torch.equal(found, expected)
    assert not torch.equal(found, model(x))


@pytest.mark.parametrize("name", PLACES)
def test_every_edge_is_applied_on_its_own(model, x, name):
    expected = model(x, lambda place, tensor: tensor * 3 if place == name else tensor)
    with applying(model, "", {PLACES[name]: lambda tensor: tensor * 3}):
        assert torch.equal(model(x), expected)


def test_the_edges_that_were_found_are_the_tensors_written_by_hand(model, x):
    flow = trace(model, lambda: model(x))
    assert set(find_edges(flow, set("abcd"))) == set(PLACES.values())


def test_without_functions_nothing_happens(model, x):
    with applying(model, "", {}):
        assert torch.equal(model(x), model(x))


def test_edges_of_functions_that_are_not_called_are_ignored(model, x):
    with applying(model, "", {edge("other:conv2d"): torch.zeros_like, edge(":relu.2"): torch.zeros_like}):
        assert torch.equal(model(x), model(x))


def test_tensors_given_by_keyword_count_too():
    class Keywords(nn.Module):
        def forward(self, x, y):
            return torch.add(input=x, other=y)

    x, y = torch.ones(2), torch.full((2,), 5.0)
    with applying(net := Keywords(), "", {edge(":add", "input", 1): torch.neg}):
        assert net(x, y).tolist() == [-4, -4]


def test_one_of_several_outputs_is_changed():
    class Halves(nn.Module):
        def forward(self, x):
            return torch.cat(x.chunk(2, 1), 1)

    with applying(net := Halves(), "", {edge(":chunk", index=1): torch.neg}):
        assert net(torch.tensor([[1.0, 2.0]])).tolist() == [[1, -2]]


def test_each_call_of_a_module_has_its_own_edges():
    model = nn.ModuleDict({"shared": nn.Linear(1, 1, bias=False)})
    nn.init.ones_(model["shared"].requires_grad_(False).weight)
    model.forward = lambda x: model["shared"](model["shared"](model["shared"](x)))
    scales = {edge("shared:linear"): 2.0, edge("shared#2:linear"): 10.0}
    functions = {place: lambda x, scale=scale: x * scale for place, scale in scales.items()}
    with applying(model, "", functions):
        assert float(model(torch.ones(1, 1))) == 20.0
    with applying(model, "", functions):  # calls are counted anew
        assert float(model(torch.ones(1, 1))) == 20.0


class InPlace(nn.Module):
    """Keeps the tensor that a function without a result wrote into."""

    def __init__(self, write):
        super().__init__()
        self.write = write

    def forward(self, x):
        y = x * 1.0
        self.write(y)
        return y + 0


@pytest.mark.parametrize(
    ("write", "place", "expected"),
    [
        (lambda y: y.relu_(), ":relu", [0, -2]),
        (lambda y: F.relu_(y), ":relu", [0, -2]),
        (lambda y: y.add_(1), ":add", [0, -3]),
        (lambda y: y.clamp_(min=1), ":clamp", [-1, -2]),
        (lambda y: y.__setitem__(0, 7.0), ":setitem", [-7, -2]),
    ],
)
def test_what_a_function_writes_in_place_is_changed_in_place(write, place, expected):
    net = InPlace(write)
    assert trace(net, lambda: net(torch.tensor([-1.0, 2.0]))).ops[1].site == edge(place).site
    with torch.no_grad(), applying(net, "", {edge(place): torch.neg}):
        assert net(torch.tensor([-1.0, 2.0])).tolist() == expected


@pytest.mark.parametrize("grad", [True, False])
def test_a_sum_in_place_is_changed_with_and_without_gradients(grad):
    class Sum(nn.Module):
        def forward(self, x):
            y = x * 1.0
            y += 1
            return y * 10

    x = torch.tensor([1.0, 2.0], requires_grad=grad)
    with applying(net := Sum(), "", {edge(":add"): lambda tensor: tensor * -2}):
        y = net(x)
    assert y.tolist() == [-40, -60]
    if grad:
        y.sum().backward()
        assert x.grad.tolist() == [-20, -20]


@pytest.mark.parametrize("inplace", [True, False])
def test_gradients_flow_through_the_functions_at_edges(inplace):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace), nn.Linear(4, 1)).requires_grad_(False)
    x = torch.randn(3, 4, requires_grad=True)
    scale = torch.tensor(3.0, requires_grad=True)
    (net[2](net[0](x).relu() * scale)).sum().backward()
    expected = x.grad.clone(), scale.grad.clone()
    x.grad = scale.grad = None
    with applying(net, "", {edge("1:relu"): lambda tensor: tensor * scale}):
        net(x).sum().backward()
    torch.testing.assert_close(x.grad, expected[0])
    torch.testing.assert_close(scale.grad, expected[1])


def test_functions_at_edges_may_call_torch_functions_of_the_same_names(model, x):
    seen = []

    def busy(tensor):
        seen.append(float(tensor.relu().relu().add(1).sum()))
        return tensor

    with applying(model, "", dict.fromkeys(PLACES.values(), busy)):
        found = model(x)
    assert len(seen) == len(PLACES)
    assert torch.equal(found, model(x))


# A part of the model on its own


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 3, 1), nn.ModuleList([Residual(), Residual()])

    def forward(self, x):
        x = self.stem(x)
        for block in self.body:
            x = block(x)
        return x


def test_a_block_called_on_its_own_is_quantized_as_inside_the_model(x):
    model = Nested().eval().requires_grad_(False)
    flow = trace(model, lambda: model(x))
    places = find_edges(flow, set(quantizable_layers(model)))
    functions = {place: quantizer(-1.0 - n, 1.0 + n) for n, place in enumerate(places)}
    seen = {}
    for name, block in model.body.named_children():
        block.register_forward_hook(lambda _, args, output, name=name: seen.update({name: (args, output)}))
    with applying(model, "", functions):
        model(x)
    inside = dict(seen)
    for name, block in model.body.named_children():
        (args, expected) = inside[name]
        with applying(block, f"body.{name}", functions):
            assert torch.equal(block(*args), expected)


def test_two_blocks_of_one_class_have_edges_of_their_own(x):
    model = Nested().eval().requires_grad_(False)
    with applying(model, "", {edge("body.1:relu"): torch.zeros_like}):
        found = model(x)
    y = model.body[0](model.stem(x))
    expected = model.body[1](y, lambda name, tensor: tensor * 0 if name == "relu" else tensor)
    assert torch.equal(found, expected)


# Nothing left behind


def global_hooks():
    from torch.nn.modules import module

    return len(module._global_forward_hooks) + len(module._global_forward_pre_hooks)


def test_hooks_and_modes_go_with_the_context_even_if_the_model_fails(model, x):
    before, expected = global_hooks(), model(x)
    with pytest.raises(RuntimeError), applying(model, "", {PLACES["b"]: torch.neg}):
        model(torch.ones(1, 4, 6, 6))
    assert global_hooks() == before
    assert torch.overrides._len_torch_function_stack() == 0
    assert torch.equal(model(x), expected)


def test_an_attached_model_that_failed_computes_as_before(model, x):
    attached(model)
    expected, before = model(x), global_hooks()
    with pytest.raises(RuntimeError):
        model(torch.ones(1, 4, 6, 6))
    assert global_hooks() == before
    assert torch.overrides._len_torch_function_stack() == 0
    assert torch.equal(model(x), expected)


def test_a_call_that_fails_and_is_caught_does_not_confuse_the_model():
    class Forgiving(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, x):
            try:
                self.second(x)
            except RuntimeError:
                x = self.first(x)
            return self.second(x) + 1

    net, x = Forgiving().requires_grad_(False), torch.randn(1, 3)
    flow = trace(net, lambda: net(x))
    site = next(op.site for op in flow.ops if op.name == "add")
    assert site.owner == ""
    with applying(net, "", {Edge(site, "output"): torch.zeros_like}):
        assert not net(x).any()


# Attached to a model


def test_an_attached_model_is_the_model_with_quantizers_written_by_hand(model, x):
    expected_of = copy.deepcopy(model)
    found = attached(model)
    made = {name: found[place] for name, place in PLACES.items()}
    assert torch.equal(model(x), expected_of(x, lambda name, tensor: made[name](tensor)))
    assert quantizers_of(model) is found
    assert isinstance(model, Residual)
    assert type(model).__name__ == "Residual"


def test_a_model_without_quantizers_has_none(model):
    assert quantizers_of(model) is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_gradients_make_no_difference_to_what_an_attached_model_computes(x, mode):
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True), Residual()).eval().requires_grad_(False)
    attached(net)
    expected = net(x)
    with mode():
        assert torch.equal(net(x), expected)
    assert torch.equal(net(x.clone().requires_grad_()).detach(), expected)


def test_gradients_flow_through_an_attached_model(model, x):
    attached(model)
    x.requires_grad_()
    model(x).sum().backward()
    assert bool(x.grad.isfinite().all())
    assert bool(x.grad.any())


def test_a_copy_of_an_attached_model_is_independent(model, x):
    attached(model)
    expected = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    for made in quantizers_of(twin).children():
        made.scale.mul_(4)
    assert torch.equal(model(x), expected)
    assert not torch.equal(twin(x), expected)


def test_the_ranges_are_part_of_the_state(model, x):
    attached(model)
    empty = Residual().eval()
    specs = quantizers_of(model).specs()
    ActivationQuantizers(specs).attach(empty)
    assert bool(empty(x).isnan().any())
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty(x), model(x))
    names = {name.partition(".")[0] for name in model.state_dict()}
    assert names == {*"abcd", ATTRIBUTE}


def test_a_model_can_be_detached_for_a_while(model, x):
    plain = model(x)
    found = attached(model)
    rounded, kind = model(x), type(model)
    with detached(model):
        assert torch.equal(model(x), plain)
        assert quantizers_of(model) is None
        assert type(model) is Residual
    with pytest.raises(RuntimeError), detached(model):
        model(torch.ones(1, 4, 6, 6))
    assert type(model) is kind
    assert quantizers_of(model) is found
    assert torch.equal(model(x), rounded)


def test_two_models_of_one_class_have_quantizers_of_their_own(x):
    first, second = Residual().eval(), Residual().eval()
    second.load_state_dict(first.state_dict())
    attached(first)
    plain = second(x)
    assert not torch.equal(first(x), plain)
    attached(second)
    assert type(first) is type(second)
    for made in quantizers_of(second).children():
        made.scale.mul_(3)
    assert not torch.equal(first(x), second(x))


def test_a_model_of_one_bare_layer_can_have_quantizers(x):
    net = nn.Conv2d(3, 3, 1).requires_grad_(False)
    plain = copy.deepcopy(net)
    found = attached(net)
    first, last = (found[place] for place in found.names)
    assert torch.equal(net(x), last(plain(first(x))))


def test_quantizers_that_no_sample_reached_are_named_and_dropped():
    places = [edge("a.b:conv2d"), edge("a.c:conv2d", "input")]
    found = ActivationQuantizers(dict.fromkeys(places, SPEC))
    found[places[1]].set_range(torch.tensor(-1.0), torch.tensor(1.0))
    assert found.drop_unreached() == [places[0]]
    assert list(found.specs()) == [places[1]]
    assert list(found.functions()) == [places[1]]


def test_the_ranges_inside_a_module_can_be_told_apart():
    places = [edge("a.b:conv2d"), edge("a.bc:conv2d"), edge("a:relu"), edge(":relu")]
    found = ActivationQuantizers(dict.fromkeys(places, SPEC))
    inside = set(found.inside("a.b"))
    assert inside == {"a/b:conv2d.scale", "a/b:conv2d.zero_point"}
    assert len(found.inside("a")) == 6
    assert found.inside("").keys() == found.state_dict().keys()
    assert all(math.isnan(float(found.inside("a.b")[name])) for name in inside if name.endswith("scale"))


def test_edges_have_names_that_differ():
    places = [
        edge("a:conv2d"),
        edge("a:conv2d", index=1),
        edge("a:conv2d", "input"),
        edge("a:conv2d", "input", 1),
        edge("a#1:conv2d"),
        edge("a:conv2d.1"),
        edge("a1:conv2d"),
    ]
    assert len({str(place) for place in places}) == len(places)
    assert len(ActivationQuantizers(dict.fromkeys(places, SPEC)).state_dict()) == 2 * len(places)
