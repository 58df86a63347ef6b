"""Searching a line of candidates: what is tried, what is found, and when measuring may stop."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq_llm.line_search import coarse_to_fine, least


class Measured:
    """Losses of the candidates 0, 1, …, and which were asked for under which limit."""

    def __init__(self, losses):
        self.losses, self.tried, self.limits = losses, [], []

    def __call__(self, candidate, limit=math.inf):
        self.tried.append(candidate)
        self.limits.append(limit)
        return self.losses[candidate]


def test_every_fourth_and_the_last_first_then_around_the_best():
    loss = Measured([abs(index - 9) for index in range(15)])
    assert coarse_to_fine(range(15), 4, loss) == 9
    assert loss.tried == [0, 4, 8, 12, 14, 6, 10, 9, 11] or loss.tried == [0, 4, 8, 12, 14, 6, 10, 7, 9]
    assert loss.limits[0] == math.inf
    assert loss.limits[1:] == [min(loss.losses[i] for i in loss.tried[:k]) for k in range(1, 9)]


@given(st.integers(1, 60), st.integers(0, 59), st.sampled_from([1, 2, 4, 8]))
def test_where_losses_fall_evenly_to_one_place_it_is_found(count, place, stride):
    place = min(place, count - 1)
    loss = Measured([abs(index - place) for index in range(count)])
    assert coarse_to_fine(range(count), stride, loss) == place
    assert len(loss.tried) == len(set(loss.tried))


@given(st.lists(st.floats(0, 10), min_size=1, max_size=40), st.sampled_from([1, 4]))
def test_it_is_the_best_of_what_was_tried_and_the_first_is_among_it(losses, stride):
    loss = Measured(losses)
    found = coarse_to_fine(range(len(losses)), stride, loss)
    assert losses[found] == min(losses[index] for index in loss.tried)
    assert 0 in loss.tried
    if stride == 1:
        assert found == losses.index(min(losses))


@pytest.mark.parametrize("search", [least, lambda line, loss: coarse_to_fine(line, 4, loss)])
def test_of_equal_losses_the_first_is_taken(search):
    assert search(range(9), Measured([1.0] * 9)) == 0


def test_a_loss_that_stops_early_changes_nothing():
    """What is above the limit may be any number above it."""
    losses = [5.0, 3.0, 4.0, 1.0, 2.0, 6.0]

    def stopping(candidate, limit=math.inf):
        return losses[candidate] if losses[candidate] <= limit else limit + 1e-9

    assert least(range(6), stopping) == 3
