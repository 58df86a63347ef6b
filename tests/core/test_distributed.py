"""Many processes, one result: what they tell each other, here between threads that stand in for them."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptqcore import MSE, Gram, MinMax, MovingAverage, Percentile, QuantSpec, Share, distributed, divided
from ptqcore.observers.per_timestep import PerTimestep
from ptqcore.sightings import Sightings
from ptqcore.timesteps import Moment, at

SPEC = QuantSpec(bits=8, symmetric=False)


def together(count, run):
    """What `run(rank)` returns in each of so many threads, which exchange values as processes do."""
    own, barrier, values = threading.local(), threading.Barrier(count), [None] * count

    def everywhere(value):
        values[own.rank] = value
        barrier.wait(10)
        found = list(values)
        barrier.wait(10)
        return found

    def begin(rank):
        own.rank = rank
        try:
            return run(rank)
        except BaseException:
            barrier.abort()
            raise

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(count) as threads:
        patch.setattr(distributed, "everywhere", everywhere)
        patch.setattr(distributed, "rank", lambda: own.rank)
        patch.setattr(distributed, "size", lambda: count)
        return list(threads.map(begin, range(count)))


@given(st.integers(1, 4), st.integers(1, 9))
def test_values_come_in_the_order_of_samples(ranks, total):
    def run(rank):
        share = Share.of(total, shared=True)
        return list(share.in_order(number * 10 for number in share.numbers))

    assert together(ranks, run) == [[number * 10 for number in range(total)]] * ranks


def test_values_are_found_only_when_they_are_wanted():
    def run(rank):
        share, asked = Share.of(6, shared=True), []

        def find():
            for number in share.numbers:
                asked.append(number)
                yield number

        for number in share.in_order(find()):
            if number == 2:
                break
        return asked

    assert together(2, run) == [[0, 2], [1, 3]]


def test_samples_that_are_not_shared_need_no_exchange():
    share = Share.of(3, shared=False)
    assert list(share.numbers) == [0, 1, 2]
    assert list(share.in_order("abc")) == ["a", "b", "c"]
    assert share.everywhere("x") == ["x"]


@given(st.integers(1, 4), st.lists(st.integers(0, 20), max_size=9))
def test_every_item_is_solved_once_and_known_to_all(ranks, items):
    solved = []

    def solve(item):
        solved.append(item)
        return item * item

    found = together(ranks, lambda _: divided(items, solve, cost=float))
    assert found == [[item * item for item in items]] * ranks
    assert sorted(solved) == sorted(items * (ranks if len(items) == 1 else 1))


def test_the_dearest_items_are_solved_apart():
    solved = {}

    def run(rank):
        return divided([1, 1, 9, 1, 8], lambda item: solved.setdefault(item, rank), cost=float)

    together(2, run)
    assert solved[9] != solved[8]


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(0, 3), st.sampled_from([3, 256, 300, 700]), st.integers(0, 2**31))
def test_grams_added_up_in_parts_are_the_same_to_the_last_bit(ranks, turn, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(5, channels, generator=generator) for _ in range(3)]
    whole = Gram(channels)
    for batch in batches:
        whole.update(batch)

    def run(rank):
        gram = Gram(channels, "cpu", Share(3, rank, ranks), turn)
        for batch in batches:
            gram.update(batch)
        gram.complete()
        return gram

    for gram in together(ranks, run):
        assert torch.equal(gram.matrix, whole.matrix)
        assert torch.equal(gram.sum, whole.sum)
        assert gram.count == whole.count


SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4)
KINDS = [MinMax, MovingAverage, Percentile, MSE]


@settings(deadline=None)
@given(st.sampled_from(KINDS), st.lists(SHAPES, min_size=1, max_size=5), st.integers(0, 2**31))
def test_observers_find_the_same_range_in_what_they_want_of_a_tensor(kind, shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    one, other = kind(SPEC), kind(SPEC)
    for shape in shapes:
        x = torch.randn(shape, generator=generator) * 3
        one.update(x)
        other.update(kind(SPEC).condensed(x))
    for found, wanted in zip(other.range(), one.range(), strict=True):
        assert torch.equal(found.reshape(-1), wanted.reshape(-1))


def test_what_is_wanted_of_a_tensor_is_small_where_two_numbers_say_it_all():
    for kind in (MinMax, MovingAverage):
        assert kind(SPEC).condensed(torch.randn(7, 3, 5)).numel() == 2
    assert MinMax(QuantSpec(bits=8, granularity="channel")).condensed(torch.ones(7, 3)).numel() == 21


def test_an_observer_of_timesteps_wants_what_that_of_the_timestep_wants():
    spec = QuantSpec(bits=8, granularity="timestep", timesteps=2)
    one, other = PerTimestep(spec, MinMax), PerTimestep(spec, MinMax)
    for row, x in ((0, torch.tensor([-1.0, 2.0, 0.5])), (1, torch.tensor([3.0, 4.0, 1.0]))):
        with at(Moment(torch.tensor(row), torch.tensor(row))):
            one.update(x)
            other.update(other.condensed(x))
            assert other.condensed(x).numel() == 2
    assert all(map(torch.equal, one.range(), other.range()))


@given(st.integers(1, 3), st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=7))
def test_sightings_are_taken_sample_by_sample_by_every_process(ranks, samples):
    def run(rank):
        share = Share.of(len(samples), shared=True)
        taken = []
        moments = [Moment(torch.tensor(number), torch.tensor(number)) for number in share.numbers]

        def take(seen):
            taken[-1].append((seen.place, seen.number, int(seen.x)))

        sightings = Sightings(share, moments, lambda: taken.append([]), take)
        for sample in sightings.samples():
            for value in samples[share.numbers[sample]]:
                x = torch.tensor(value)
                sightings.see("layer", x, source=x)
                x.add_(100)  # in place, behind the layer
                sightings.see(1, x.clone() - 100)
        return [of_sample for of_sample in taken if of_sample]

    expected = [
        [
            (place, 2 * at + 1 + later, value)
            for at, value in enumerate(one)
            for later, place in enumerate(("layer", 1))
        ]
        for one in samples
        if one
    ]
    assert together(ranks, run) == [expected] * ranks


def test_the_very_same_tensor_keeps_its_number():
    numbers = []
    sightings = Sightings(Share(1), [None], lambda: None, lambda seen: numbers.append(seen.number))
    for _ in sightings.samples():
        x, y = torch.ones(2), torch.ones(2)
        for source in (x, x, None, x, y, x):
            sightings.see("layer", x, source=source)
    assert numbers == [1, 1, 2, 1, 3, 4]


def test_values_that_processes_cannot_exchange_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    with pytest.raises(TypeError, match="cannot exchange a set"):
        distributed.everywhere({1, 2}.copy())


def test_one_process_is_first_alone_and_has_no_name(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("RANK", "3")
    assert (distributed.rank(), distributed.size(), distributed.name()) == (0, 1, "")
    assert distributed.is_first()


def test_processes_are_named_once_there_are_several(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert not distributed.is_first()
    assert distributed.name() == "process 4 of 4: "


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
