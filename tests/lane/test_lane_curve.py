"""Curves: how outputs of their family are read, what they learn, and the small network."""

import numpy as np
import planted_lanes as planted
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lane_targets import curve as learner

from ptq_lane import Frame
from ptq_lane.families.curve import Curve, bernstein
from ptq_lane.networks.curve import CurveNet
from ptqcore import ModelError

FRAME = Frame(200, 100)
COLUMNS = 12


def outputs(logits, curves):
    """Of one image: existence of every column, and the control points [4, 2] of some, as shares."""
    points = torch.full((1, 8, COLUMNS), 0.5)
    for column, curve in curves.items():
        points[0, :, column] = torch.tensor(curve, dtype=torch.float32).flatten()
    existence = torch.full((1, COLUMNS), -5.0)
    for column, logit in logits.items():
        existence[0, column] = logit
    return {"existence": existence, "points": points}


def straight(x_bottom, x_top, bottom=0.955, top=0.305):
    """Control points of a straight line, evenly spaced."""
    share = np.linspace(0, 1, 4)
    return np.stack([x_bottom + share * (x_top - x_bottom), bottom + share * (top - bottom)], 1).tolist()


def decode(given, **options):
    (lanes,) = Curve(FRAME, **options).decode(given)
    return lanes


def test_a_straight_curve_is_a_straight_lane():
    lanes = decode(outputs({4: 5.0}, {4: straight(0.2, 0.5)}))
    assert lanes.slots.tolist() == [4]
    present = ~np.isnan(lanes.x[0])
    assert np.flatnonzero(present).tolist() == list(range(30, 96))
    y = (lanes.rows[present] + 0.5) / 100
    np.testing.assert_allclose(
        lanes.x[0, present], 200 * np.interp(y, [0.305, 0.955], [0.5, 0.2]) - 0.5, atol=1e-3
    )


def test_a_curve_runs_through_the_points_of_its_formula():
    curve = np.array([[0.1, 0.9], [0.2, 0.7], [0.6, 0.6], [0.7, 0.3]])
    lanes = decode(outputs({4: 5.0}, {4: curve.tolist()}), samples=400)
    t = np.linspace(0, 1, 5001)[:, None]
    x, y = (
        (1 - t) ** 3 * curve[0]
        + 3 * t * (1 - t) ** 2 * curve[1]
        + 3 * t**2 * (1 - t) * curve[2]
        + t**3 * curve[3]
    ).T
    present = ~np.isnan(lanes.x[0])
    expected = np.interp((lanes.rows[present] + 0.5) / 100, y[::-1], x[::-1]) * 200 - 0.5
    np.testing.assert_allclose(lanes.x[0, present], expected, atol=0.01)


def test_the_direction_of_a_curve_is_of_no_matter():
    one = decode(outputs({4: 5.0}, {4: straight(0.2, 0.5)}))
    other = decode(outputs({4: 5.0}, {4: straight(0.2, 0.5)[::-1]}))
    np.testing.assert_allclose(other.x, one.x, atol=1e-3)


def test_of_a_window_the_likeliest_column_has_the_lane():
    curves = {column: straight(column / 12, 0.5) for column in range(COLUMNS)}
    given = outputs({2: 2.0, 3: 4.0, 5: 3.0, 6: 1.0, 9: 0.5}, curves)
    assert decode(given, window=3).slots.tolist() == [3, 5, 9]
    assert decode(given, window=5).slots.tolist() == [3, 9]
    assert decode(given, window=3, most=2).slots.tolist() == [3, 5]
    assert decode(given, window=3, threshold=0.9).slots.tolist() == [3, 5]


def test_of_equal_columns_the_first_has_the_lane():
    curves = {column: straight(column / 12, 0.5) for column in range(COLUMNS)}
    assert decode(outputs({4: 2.0, 5: 2.0, 6: 2.0}, curves)).slots.tolist() == [4]


def test_no_column_no_lane():
    lanes = decode(outputs({}, {}))
    assert lanes.x.shape == (0, 100)
    assert lanes.slots.shape == (0,)


def test_a_larger_frame_shows_the_same_lane_larger():
    given = outputs({4: 5.0}, {4: straight(0.2, 0.5)})
    one = decode(given)
    (other,) = Curve(Frame(1000, 500)).decode(given)
    y = (other.rows + 0.5) / 5 - 0.5
    inside = (y >= 30) & (y <= 95)
    expected = (np.interp(y, one.rows[30:96], one.x[0, 30:96]) + 0.5) * 5 - 0.5
    np.testing.assert_allclose(other.x[0][inside], expected[inside], atol=0.01)


@pytest.fixture(scope="module")
def random_outputs():
    random = torch.Generator().manual_seed(0)
    return {
        "existence": 2 * torch.randn(3, COLUMNS, generator=random),
        "points": torch.rand(3, 8, COLUMNS, generator=random),
    }


def test_the_adapter_keeps_its_promises(random_outputs):
    adapter = Curve(FRAME)
    planted.check_views(adapter, random_outputs)
    planted.check_confidence(adapter, random_outputs)
    planted.check_geometry(adapter, random_outputs, (3, COLUMNS))
    planted.check_gradient(adapter, random_outputs, ["points"])


def test_the_gradient_is_that_of_the_curve():
    """Moving all control points aside moves x as much, and down as much as the curve leans."""
    given = outputs({4: 5.0}, {4: straight(0.2, 0.5)})
    given["points"].requires_grad_()
    x, weight = Curve(FRAME).geometry(given)
    rows = weight[0, 4] > 0.5
    torch.autograd.backward(x[0, 4, rows].mean())
    gradient = given["points"].grad[0, :, 4].view(4, 2).sum(0)
    lean = (0.5 - 0.2) * 200 / ((0.305 - 0.955) * 100)
    np.testing.assert_allclose(gradient.numpy(), [200, -100 * lean], rtol=1e-3)


def test_confidence_reaches_as_far_as_the_window():
    confidence = Curve(FRAME, window=3).confidence(outputs({4: 5.0}, {}))
    near = torch.zeros(COLUMNS, dtype=torch.bool)
    near[3:6] = True
    assert torch.equal(confidence["existence"][0] > 0.9, near)
    assert torch.equal(confidence["points"][0, 0] > 0.9, near)


def test_outputs_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match="existence, points"):
        Curve(FRAME).heads({"points": torch.zeros(1, 8, 4)})


@given(st.integers(2, 80))
@settings(max_examples=20, deadline=None)
def test_control_points_share_every_sample(samples):
    weights = bernstein(samples)
    assert weights.shape == (samples, 4)
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_allclose(weights[[0, -1]], [[1, 0, 0, 0], [0, 0, 0, 1]])


def test_what_is_learned_decodes_to_the_lanes():
    lines = planted.road_lanes(24)
    targets = planted.stacked([learner.targets(lanes, planted.FRAME) for lanes in lines])
    given = {"existence": torch.logit(targets["existence"], eps=1e-6), "points": targets["points"]}
    for found, wanted in zip(learner.adapter(planted.FRAME).decode(given), lines, strict=True):
        distance, alone = planted.far_apart(found, wanted)
        assert distance < 12
        assert alone <= 3


def test_the_loss_of_perfect_answers_is_that_of_existence_alone():
    targets = planted.stacked([learner.targets(lanes, planted.FRAME) for lanes in planted.road_lanes(4)])
    given = {"existence": torch.zeros_like(targets["existence"]), "points": targets["points"].clone()}
    good = learner.loss(given, targets)
    assert good == pytest.approx(10 * np.log(2), rel=1e-5)
    given["points"] += 0.1
    assert learner.loss(given, targets) > good + 5


def test_the_network_answers_for_every_column_and_is_traced():
    network = CurveNet()
    planted.check_trace(network)
    found = network(torch.zeros(2, 3, 96, 192))
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "existence": (2, 24),
        "points": (2, 8, 24),
    }


def test_the_network_runs_in_onnx_runtime(tmp_path):
    planted.check_onnx(CurveNet(), tmp_path)
