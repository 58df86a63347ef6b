"""One sweep of GPTQ: identities, the published algorithm written out, brute force on two columns."""

import pytest
import torch
from gram_data import SPECS, damped, gram_of, heavy_tailed, inputs, objective, output_error, rounded, same

from ptq_llm.gptq_sweep import compensate, factorize
from ptqcore import QuantizedTensor, QuantSpec, grid

CHANNELS = 24


def one_sweep(weight, gram, spec, **options):
    factor = factorize(gram, **options)
    return compensate([weight], [rounded(weight, spec)], factor)[0][0]


# The factor


@pytest.mark.parametrize("act_order", [False, True])
def test_the_factor_is_that_of_the_damped_gram_in_its_order(act_order):
    gram = gram_of(inputs(100, CHANNELS)).matrix
    factor = factorize(gram, 0.01, act_order)
    unit = factor.unit.double()
    product = unit * factor.pivots.double() @ unit.T
    assert factor.damping == pytest.approx(0.01 * float(gram.diagonal().mean()))
    expected = damped(gram, factor.damping)[factor.order][:, factor.order]
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(unit, unit.triu())
    assert torch.equal(factor.unit.diagonal(), torch.ones(CHANNELS))


def test_the_channels_of_the_largest_inputs_come_first():
    gram = gram_of(inputs(100, CHANNELS)).matrix
    ordered = gram.diagonal()[factorize(gram).order]
    assert torch.equal(ordered, ordered.sort(descending=True).values)
    assert factorize(gram, act_order=False).order.tolist() == list(range(CHANNELS))


def test_the_factor_gives_the_error_of_any_change():
    gram, change = gram_of(inputs(100, CHANNELS)).matrix, heavy_tailed(5, CHANNELS, seed=1)
    factor = factorize(gram)
    expected = ((change.double() @ damped(gram, factor.damping)) * change.double()).sum(1)
    torch.testing.assert_close(factor.error(change).double(), expected, rtol=1e-4, atol=1e-4)


def test_damping_raises_itself_until_there_is_a_factor():
    """A matrix that is no Gram, as rounding makes them: its lowest eigenvalue is −0.5, its mean
    diagonal 1."""
    gram = torch.eye(3) + 1.5 * (torch.ones(3, 3) - torch.eye(3))
    gram[2, :2] = gram[:2, 2] = 0
    assert torch.linalg.eigvalsh(gram).min() == pytest.approx(-0.5)
    factor = factorize(gram, 0.01)
    assert factor.damping == pytest.approx(1.0)  # 0.01 and 0.1 are too little
    assert torch.isfinite(factor.unit).all()


def test_a_gram_that_is_not_finite_has_no_factor():
    gram = torch.eye(3)
    gram[1, 1] = torch.inf
    assert factorize(gram) is None


def test_a_gram_of_zeros_is_that_of_rounding():
    weight, spec = heavy_tailed(4, CHANNELS, seed=2), SPECS["asymmetric groups"]
    assert same(one_sweep(weight, torch.zeros(CHANNELS, CHANNELS), spec), rounded(weight, spec))


# One sweep


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_with_identity_hessian_equals_rounding(name, act_order):
    weight, spec = heavy_tailed(7, CHANNELS, seed=2), SPECS[name]
    found = one_sweep(weight, torch.eye(CHANNELS), spec, act_order=act_order)
    assert same(found, rounded(weight, spec))


@pytest.mark.parametrize("name", SPECS)
def test_the_order_does_not_matter_where_the_gram_is_diagonal(name):
    weight, spec = heavy_tailed(7, CHANNELS, seed=2), SPECS[name]
    gram = torch.diag(heavy_tailed(CHANNELS, seed=3).square())
    ordered, plain = (one_sweep(weight, gram, spec, act_order=order) for order in (True, False))
    assert same(ordered, plain)


def published(weight, gram, spec, damping, act_order):
    """GPTQ as it is published (algorithm 1, with static groups): the inverse Hessian's upper Cholesky
    factor, one column after the other, in float64."""
    hessian = gram.double().clone()
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else range(len(gram))
    order = torch.tensor(list(order))
    inverse = torch.linalg.inv(hessian[order][:, order])
    factor = torch.linalg.cholesky(inverse, upper=True)
    start = rounded(weight, spec)
    size = spec.group_size or weight.shape[1]
    left, codes = weight.double()[:, order].clone(), start.codes.clone()
    line = QuantSpec(**spec.model_dump() | {"granularity": "channel", "group_size": None})
    for place, column in enumerate(order.tolist()):
        group = column // size if spec.granularity == "group" else 0
        scale = start.scale.double().expand(len(weight), -1)[:, group : group + 1]
        point = start.zero_point
        point = None if point is None else point.double().expand(len(weight), -1)[:, group : group + 1]
        code = grid.quantize(left[:, place : place + 1], scale, point, line)
        error = (left[:, place : place + 1] - grid.dequantize(code, scale, point, line)) / factor[
            place, place
        ]
        left[:, place:] -= error @ factor[place : place + 1, place:]
        codes[:, column] = code[:, 0]
    return codes


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("act_order", [False, True])
def test_the_sweep_is_the_published_algorithm(name, act_order):
    weight, spec, gram = (
        heavy_tailed(9, CHANNELS, seed=4),
        SPECS[name],
        gram_of(inputs(90, CHANNELS)).matrix,
    )
    found = one_sweep(weight, gram, spec, damping=0.02, act_order=act_order)
    assert torch.equal(found.codes, published(weight, gram, spec, 0.02, act_order))


def test_the_second_of_two_columns_makes_up_for_the_first_as_well_as_any_code_could():
    """2 bits, 2 columns: q₂ = Q(w₂ + (w₁ − q₁) H₁₂ / H₂₂), and no other code is better, given q₁."""
    spec = QuantSpec(bits=2, symmetric=False, granularity="channel")
    gram = torch.tensor([[2.0, 1.2], [1.2, 1.0]])
    weight = torch.tensor([[0.9, -1.1], [0.4, 0.7], [-0.3, 1.3], [1.0, 0.2]])
    factor = factorize(gram, 1e-9, act_order=False)
    start = rounded(weight, spec)
    found = compensate([weight], [start], factor)[0][0]
    values = (torch.arange(4.0) - start.zero_point) * start.scale  # [rows, codes]
    for row in range(len(weight)):
        first, second = values[row, found.codes[row].long()]
        nearest = values[row][(values[row] - weight[row, 0]).abs().argmin()]
        assert first == nearest
        target = weight[row, 1] + (weight[row, 0] - first) * gram[0, 1] / gram[1, 1]
        assert second == values[row][(values[row] - target).abs().argmin()]
        changes = torch.stack([first - weight[row, 0] + 0 * values[row], values[row] - weight[row, 1]], 1)
        errors = ((changes @ gram) * changes).sum(1)
        assert second == values[row][errors.argmin()]


def test_the_sweep_knows_its_error():
    weight, spec, gram = (
        heavy_tailed(9, CHANNELS, seed=4),
        SPECS["ragged groups"],
        gram_of(inputs(90, CHANNELS)),
    )
    factor = factorize(gram.matrix)
    (found,), (errors,) = compensate([weight], [rounded(weight, spec)], factor)
    expected = objective(damped(gram.matrix, factor.damping), weight, found)
    torch.testing.assert_close(errors.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SPECS)
def test_stacking_layers_changes_nothing(name):
    """q, k and v in one sweep have the codes that they have alone."""
    spec, factor = SPECS[name], factorize(gram_of(inputs(90, CHANNELS)).matrix)
    weights = [heavy_tailed(rows, CHANNELS, seed=rows) for rows in (16, 4, 7)]
    starts = [rounded(weight, spec) for weight in weights]
    together, errors = compensate(weights, starts, factor)
    for weight, start, found, error in zip(weights, starts, together, errors, strict=True):
        (alone,), (own_error,) = compensate([weight], [start], factor)
        assert same(found, alone)
        torch.testing.assert_close(error, own_error)


def test_dead_channels_are_rounded_and_disturb_nobody():
    x = inputs(90, CHANNELS)
    x[:, [3, 10, 11]] = 0
    weight, spec = heavy_tailed(9, CHANNELS, seed=4), SPECS["asymmetric groups"]
    found, start = one_sweep(weight, gram_of(x).matrix, spec), rounded(weight, spec)
    assert torch.equal(found.codes[:, [3, 10, 11]], start.codes[:, [3, 10, 11]])
    assert torch.isfinite(found.dequantize()).all()
    other = weight.clone()
    other[:, [3, 10, 11]] *= 0.5  # ranges stay: the largest weights are elsewhere
    again = QuantizedTensor.from_range(other, *grid.value_range(weight, spec), spec)
    again = compensate([other], [again], factorize(gram_of(x).matrix))[0][0]
    alive = [channel for channel in range(CHANNELS) if channel not in (3, 10, 11)]
    assert torch.equal(again.codes[:, alive], found.codes[:, alive])


def test_an_ill_conditioned_gram_gives_finite_weights_and_less_error():
    """All channels say the same but for a millionth."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 1, generator=generator) * 1000 + 1e-3 * torch.randn(
        300, CHANNELS, generator=generator
    )
    weight, spec = heavy_tailed(9, CHANNELS, seed=4), SPECS["asymmetric groups"]
    found = one_sweep(weight, gram_of(x).matrix, spec)
    assert torch.isfinite(found.dequantize()).all()
    assert output_error(x, weight, found) < 0.05 * output_error(x, weight, rounded(weight, spec))
