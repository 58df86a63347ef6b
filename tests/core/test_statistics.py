"""The Gram matrix against sums written out over all tokens."""

import math

import pytest
import torch

from ptqcore.statistics import Gram


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_of(*batches, channels=6):
    gram = Gram(channels)
    for batch in batches:
        gram.update(batch)
    return gram


BATCHES = [random(4, 5, 6, seed=1), random(7, 6, seed=2) * 3, random(1, 1, 2, 6, seed=3)]
TOKENS = torch.cat([batch.reshape(-1, 6) for batch in BATCHES]).double()


def test_matrix_is_the_product_of_all_tokens():
    torch.testing.assert_close(gram_of(*BATCHES).matrix.double(), TOKENS.T @ TOKENS, rtol=1e-5, atol=1e-4)


def test_count_mean_low_and_high_are_those_of_all_tokens():
    gram = gram_of(*BATCHES)
    assert gram.count == 20 + 7 + 2
    torch.testing.assert_close(gram.mean, TOKENS.mean(0), rtol=1e-6, atol=1e-7)
    assert torch.equal(gram.low.double(), TOKENS.amin(0))
    assert torch.equal(gram.high.double(), TOKENS.amax(0))


def test_whole_numbers_are_exact():
    x = torch.tensor([[1.0, -2.0], [3.0, 4.0], [0.0, 5.0]])
    gram = gram_of(x, channels=2)
    assert gram.matrix.tolist() == [[10.0, 10.0], [10.0, 45.0]]
    assert gram.mean.tolist() == [4 / 3, 7 / 3]
    assert (gram.low.tolist(), gram.high.tolist()) == ([0.0, -2.0], [3.0, 5.0])


def test_merge_equals_one_gram_of_all_tokens():
    merged, whole = gram_of(BATCHES[0]), gram_of(*BATCHES)
    merged.merge(gram_of(*BATCHES[1:]))
    torch.testing.assert_close(merged.matrix, whole.matrix, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged.mean, whole.mean)
    assert torch.equal(merged.low, whole.low)
    assert torch.equal(merged.high, whole.high)
    assert merged.count == whole.count


def test_merging_a_gram_without_tokens_changes_nothing():
    gram, before = gram_of(*BATCHES), gram_of(*BATCHES)
    gram.merge(Gram(6))
    assert torch.equal(gram.matrix, before.matrix)
    assert torch.equal(gram.low, before.low)
    assert torch.equal(gram.high, before.high)
    assert gram.count == before.count


def test_zero_tokens_change_nothing():
    gram = gram_of(torch.empty(0, 6), torch.empty(2, 0, 6))
    assert gram.count == 0
    assert not gram.matrix.any()
    assert gram.mean.tolist() == [0.0] * 6
    assert gram.relative_error(random(3, 6), random(3, 6, seed=1)) == 0.0


def test_energy_is_the_squared_norm_of_the_output():
    weight = random(3, 6, seed=4)
    expected = (TOKENS @ weight.double().T).square().sum()
    assert gram_of(*BATCHES).energy(weight) == pytest.approx(expected.item(), rel=1e-5)


def test_energy_is_never_negative():
    """Weights that the tokens do not see give no output; rounding must not turn that below zero."""
    for seed in range(20):
        x = random(3, 16, seed=seed)
        unseen = torch.linalg.svd(x.double()).Vh[3:].float()
        gram = gram_of(x, channels=16)
        assert all(gram.energy(row[None]) >= 0 for row in unseen)


@pytest.mark.parametrize("noise", [1.0, 1e-2, 1e-4])
def test_relative_error_equals_the_direct_ratio_of_output_norms(noise):
    weight = random(3, 6, seed=4)
    quantized = weight + noise * random(3, 6, seed=5)
    x = TOKENS
    error = (x @ (quantized - weight).double().T).square().sum()
    expected = error / (x @ weight.double().T).square().sum()
    assert gram_of(*BATCHES).relative_error(weight, quantized) == pytest.approx(expected.item(), rel=1e-4)


def test_relative_error_of_an_unchanged_weight_is_zero():
    weight = random(3, 6)
    assert gram_of(*BATCHES).relative_error(weight, weight.clone()) == 0.0
    assert gram_of(*BATCHES).relative_error(torch.zeros(3, 6), torch.zeros(3, 6)) == 0.0


def test_relative_error_of_a_weight_without_output_is_infinite():
    assert gram_of(*BATCHES).relative_error(torch.zeros(3, 6), torch.ones(3, 6)) == math.inf


def test_relative_error_of_a_halved_weight_is_a_quarter():
    weight = random(3, 6)
    assert gram_of(*BATCHES).relative_error(weight, weight / 2) == pytest.approx(0.25, rel=1e-6)


def test_half_precision_tokens_are_summed_in_float32():
    x = torch.full((4096, 2), 0.1, dtype=torch.bfloat16)
    gram = gram_of(x, channels=2)
    exact = x[0, 0].item()
    assert gram.matrix.dtype == torch.float32
    assert gram.matrix[0, 1].item() == pytest.approx(4096 * exact**2, rel=1e-4)
    assert gram.mean[0].item() == pytest.approx(exact, rel=1e-6)


def test_tokens_that_require_grad_leave_no_graph():
    gram = gram_of(random(4, 6).requires_grad_())
    assert not gram.matrix.requires_grad
    assert not gram.mean.requires_grad
