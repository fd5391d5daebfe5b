"""Closed forms, gradients and clip boundaries of the surrogate, and its reduction over micro-batches and ranks.

Shape legend: B samples, S steps.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmalign.losses.policy_gradient import clipped_surrogate, ratio_stats
from mmalign.losses.reduce import masked_mean


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- clipped surrogate ------------------------------------------------------------------------------------------------


def test_surrogate_is_the_published_form():
    old_BS, advantage_B = randn(16, 5), randn(16, seed=1)
    new_BS = old_BS + 0.3 * randn(16, 5, seed=2)
    ratio_BS = torch.exp(new_BS - old_BS)
    for low, high in [(0.2, 0.2), (0.1, 0.3)]:
        expected = torch.maximum(
            -advantage_B[:, None] * ratio_BS, -advantage_B[:, None] * ratio_BS.clamp(1 - low, 1 + high)
        )
        torch.testing.assert_close(clipped_surrogate(new_BS, old_BS, advantage_B, clip_range=(low, high)), expected)
    both = clipped_surrogate(new_BS, old_BS, advantage_B, clip_range=0.2)
    assert torch.equal(both, clipped_surrogate(new_BS, old_BS, advantage_B, clip_range=(0.2, 0.2)))


@pytest.mark.parametrize("clip_range", [1e-6, 1e-4, 0.2, (0.1, 0.3)])
def test_on_policy_loss_is_minus_the_advantage_and_its_gradient_too(clip_range: float | tuple[float, float]):
    log_prob_BS = randn(4, 3, dtype=torch.float32).requires_grad_()
    advantage_B = torch.tensor([1.5, -0.5, 0.0, 5.0])
    loss_BS = clipped_surrogate(log_prob_BS, log_prob_BS.detach(), advantage_B, clip_range=clip_range)
    assert loss_BS.shape == (4, 3)
    assert loss_BS.dtype == torch.float32
    assert torch.equal(loss_BS, -advantage_B[:, None].expand(4, 3))
    loss_BS.sum().backward()
    assert torch.equal(log_prob_BS.grad, -advantage_B[:, None].expand(4, 3))


def test_numeric_gradient_equals_analytic():
    advantage_B = torch.tensor([1.0, -1.0, 2.5, -0.3], dtype=torch.float64)
    old_BS = randn(4, 6)
    # Half of the ratios are clipped at .05, none of them within the difference quotient of a boundary.
    new_BS = (old_BS + 0.1 * randn(4, 6, seed=3)).requires_grad_()
    ratio_BS = torch.exp(new_BS - old_BS)
    assert ((ratio_BS - 1).abs() - 0.05).abs().min() > 1e-4
    assert 6 <= int(((ratio_BS - 1).abs() > 0.05).sum()) <= 18
    assert torch.autograd.gradcheck(lambda new: clipped_surrogate(new, old_BS, advantage_B, clip_range=0.05), (new_BS,))


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected_ratio", "gradient_flows"),
    [
        (1.05, 1.0, 1.05, True),
        (1.3, 1.0, 1.1, False),  # a good sample that is already likelier than allowed
        (0.7, 1.0, 0.7, True),  # a good sample that became less likely is pulled back, however far
        (1.3, -1.0, 1.3, True),
        (0.7, -1.0, 0.8, False),
        (0.95, -1.0, 0.95, True),
    ],
)
def test_clipping_by_hand(ratio: float, advantage: float, expected_ratio: float, gradient_flows: bool):
    log_ratio_BS = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    advantage_B = torch.tensor([advantage], dtype=torch.float64)
    loss_BS = clipped_surrogate(log_ratio_BS, torch.zeros(1, 1), advantage_B, clip_range=(0.2, 0.1))
    assert loss_BS.item() == pytest.approx(-advantage * expected_ratio, rel=1e-12)
    loss_BS.sum().backward()
    assert log_ratio_BS.grad.item() == pytest.approx(-advantage * ratio if gradient_flows else 0.0, rel=1e-12)


@pytest.mark.parametrize(("inside", "gradient"), [(1 - 1e-9, 1.0), (1 + 1e-9, 0.0)])
def test_gradient_ends_at_the_boundary_and_the_loss_is_continuous_there(inside: float, gradient: float):
    log_ratio_BS = torch.tensor([[0.1 * inside], [-0.1 * inside]], dtype=torch.float64, requires_grad=True)
    advantage_B = torch.tensor([1.0, -1.0], dtype=torch.float64)
    bounds = (-math.expm1(-0.1), math.expm1(0.1))
    loss_BS = clipped_surrogate(log_ratio_BS, torch.zeros(2, 1), advantage_B, clip_range=bounds)
    boundary_BS = -advantage_B[:, None] * torch.tensor([[0.1], [-0.1]], dtype=torch.float64).exp()
    torch.testing.assert_close(loss_BS, boundary_BS, rtol=1e-9, atol=0)
    loss_BS.sum().backward()
    torch.testing.assert_close(log_ratio_BS.grad, gradient * boundary_BS, rtol=1e-9, atol=0)


def test_clip_range_of_1e6_is_resolved_in_fp32():
    """ρ in fp32 has steps of 6e-8 and 1.2e-7; the test of ρ against 1 ± 1e-6 must not be off by one of them."""
    epsilon = 1e-6
    for factor, clipped in [(0.99, False), (1.01, True)]:
        log_ratio_BS = torch.tensor([[factor * epsilon], [-factor * epsilon]], requires_grad=True)
        advantage_B = torch.tensor([1.0, -1.0])
        clipped_surrogate(log_ratio_BS, torch.zeros(2, 1), advantage_B, clip_range=epsilon).sum().backward()
        assert (log_ratio_BS.grad == 0).all().item() is clipped
        stats = ratio_stats(log_ratio_BS.detach(), torch.zeros(2, 1), clip_range=epsilon)
        assert (stats.clipped_high_BS[0, 0].item(), stats.clipped_low_BS[1, 0].item()) == (clipped, clipped)


def test_surrogate_bounds_the_unclipped_objective_from_above():
    old_BS, advantage_B = randn(64, 4), randn(64, seed=1)
    new_BS = old_BS + randn(64, 4, seed=2)
    unclipped = -advantage_B[:, None] * torch.exp(new_BS - old_BS)
    loss_BS = clipped_surrogate(new_BS, old_BS, advantage_B, clip_range=0.2)
    assert (loss_BS >= unclipped - 1e-12).all()
    wide = clipped_surrogate(new_BS, old_BS, advantage_B, clip_range=(0.999999, 1e6))
    torch.testing.assert_close(wide, unclipped, rtol=1e-6, atol=1e-6)


def test_no_gradient_into_what_was_recorded():
    new, old, advantage = (randn(2, 3, seed=seed).requires_grad_() for seed in range(3))
    clipped_surrogate(new, old, advantage[:, 0], clip_range=0.2).sum().backward()
    assert new.grad is not None
    assert old.grad is None
    assert advantage.grad is None


def test_half_precision_log_probs_are_compared_in_fp32():
    loss_BS = clipped_surrogate(torch.zeros(1, 1).bfloat16(), torch.full((1, 1), 1e-3), torch.ones(1), clip_range=0.2)
    assert loss_BS.dtype == torch.float32
    assert loss_BS.item() == pytest.approx(-math.exp(-1e-3), rel=1e-6)


@pytest.mark.parametrize("clip_range", [0.0, -1e-4, 1.0, math.nan, math.inf, (0.1, -0.1), (0.1, math.nan)])
def test_clip_range_is_refused(clip_range: float | tuple[float, float]):
    with pytest.raises(ValueError, match="clip_range = "):
        clipped_surrogate(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), clip_range=clip_range)


def test_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[2, 1\]: both must be \[B, S\]"):
        clipped_surrogate(torch.zeros(2, 3), torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match=r"both must be \[B, S\]"):
        clipped_surrogate(torch.zeros(2), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"\[3\]: must be \[2\]"):
        clipped_surrogate(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3))


# --- ratio statistics -------------------------------------------------------------------------------------------------


def test_ratio_stats_by_hand():
    ratio_BS = torch.tensor([[1.0, 1.3], [0.7, 0.95]], dtype=torch.float64)
    stats = ratio_stats(ratio_BS.log(), torch.zeros(2, 2), clip_range=(0.2, 0.1))
    torch.testing.assert_close(stats.ratio_BS, ratio_BS)
    assert stats.clipped_low_BS.tolist() == [[0, 0], [1, 0]]
    assert stats.clipped_high_BS.tolist() == [[0, 1], [0, 0]]
    torch.testing.assert_close(stats.approx_kl_BS, ratio_BS.log().square() / 2)


def test_ratio_stats_are_detached():
    new_BS = torch.zeros(2, 2, requires_grad=True)
    stats = ratio_stats(new_BS, torch.zeros(2, 2))
    assert not any(getattr(stats, name).requires_grad for name in stats.__dataclass_fields__)


# --- reduction --------------------------------------------------------------------------------------------------------


def test_masked_mean_by_hand():
    value_BS = torch.tensor([[1.0, 2.0], [3.0, 4.0], [math.nan, 6.0]])
    assert masked_mean(value_BS, torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])).item() == pytest.approx(7 / 3)
    assert masked_mean(value_BS, torch.tensor([1.0, 0.0, 0.0])).item() == pytest.approx(1.5)
    assert masked_mean(value_BS[:, 1], torch.tensor([1.0, 0.5, 0.0])).item() == pytest.approx(4 / 1.5)
    assert masked_mean(value_BS, torch.tensor([1.0, 0.0, 0.0]), 8).item() == pytest.approx(3 / 8)


def test_masking_is_the_same_as_leaving_out_in_value_and_gradient():
    full_BS = randn(6, 3).requires_grad_()
    weight_B = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    masked_mean(full_BS.square(), weight_B).backward()
    rest_BS = full_BS.detach()[weight_B > 0].requires_grad_()
    rest_BS.square().mean().backward()
    torch.testing.assert_close(full_BS.grad[weight_B > 0], rest_BS.grad)
    assert (full_BS.grad[weight_B == 0] == 0).all()


@pytest.mark.parametrize("cuts", [(12,), (6, 6), (4, 4, 4), (1, 9, 2)])
def test_parts_of_an_optimiser_step_add_up_however_they_are_dealt_out(cuts: tuple[int, ...]):
    """Micro-batches and ranks: one global denominator, whatever the drops are in each part."""
    log_prob_BS, advantage_B = randn(12, 4).requires_grad_(), randn(12, seed=1)
    old_BS = log_prob_BS.detach() + 0.01 * randn(12, 4, seed=2)
    weight_B = torch.tensor([1.0, 1, 0, 0, 0, 0, 1, 1, 1, 0, 1, 1])
    whole = masked_mean(clipped_surrogate(log_prob_BS, old_BS, advantage_B, clip_range=0.2), weight_B)
    (expected,) = torch.autograd.grad(whole, log_prob_BS)
    denominator = weight_B.sum() * 4
    parts = [
        masked_mean(clipped_surrogate(new, old, advantage, clip_range=0.2), weight, denominator)
        for new, old, advantage, weight in zip(
            log_prob_BS.split(cuts), old_BS.split(cuts), advantage_B.split(cuts), weight_B.split(cuts), strict=True
        )
    ]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), log_prob_BS)[0], expected)


def test_everything_dropped_gives_zero_and_zero_gradient():
    value_BS = randn(2, 3).requires_grad_()
    loss = masked_mean(value_BS, torch.zeros(2))
    loss.backward()
    assert loss.item() == 0
    assert (value_BS.grad == 0).all()
