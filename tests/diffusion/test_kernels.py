"""Flow SDEs: published coefficient tables, exact identities, what they leave invariant, log-probs and KL.

Shape legend: B samples, S = N steps (S1 = N + 1 noise levels), C/h/w latents.
"""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from mmalign.diffusion import kernels
from mmalign.diffusion.kernels import Steps, flow_steps
from mmalign.diffusion.schedule import FlowSchedule

from .samplers import flux_sigmas, randn, sd35_sigmas, shifted

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


# --- coefficients of the flow SDEs ------------------------------------------------------------------------------------

# σ, σ', g, std, A, B, c = |B| / std: ten steps of SD3.5 under Flow-SDE 0.7.
SD35 = """
1.00000 .96013 3.5057 .70000 .75500 -.03987 .05696
 .96013 .91335 3.4351 .74296 .71254 -.05824 .07839
 .91335 .85769 2.2726 .53615 .84263 -.06929 .12924
 .85769 .79037 1.7185 .44590 .88409 -.08382 .18798
 .79037 .70728 1.3592 .39179 .90289 -.10345 .26403
 .70728 .60215 1.0881 .35280 .91201 -.13088 .37099
 .60215 .46488  .8612 .31907 .91546 -.17091 .53564
 .46488 .27805  .6524 .28201 .91446 -.23260 .82480
 .27805 .00893  .4344 .22536 .90867 -.33505 1.48675
"""


def test_flow_sde_on_the_schedule_of_sd35():
    sigma_S1 = sd35_sigmas()
    steps = flow_steps(sigma_S1, kernel="flow_sde", level=0.7)
    assert len(steps) == 10
    table = torch.tensor([[float(cell) for cell in line.split()] for line in SD35.split("\n") if line])
    delta_S = sigma_S1[:-1] - sigma_S1[1:]
    columns = [
        sigma_S1[:-1], sigma_S1[1:], steps.std_S / delta_S.sqrt(), steps.std_S, steps.A_S, steps.B_S,
        steps.B_S.abs() / steps.std_S,
    ]  # fmt: skip
    ours = torch.stack([column[:9] for column in columns], 1)
    places = torch.tensor([5e-6, 5e-6, 5e-5, 5e-6, 5e-6, 5e-6, 5e-6])
    # Half a unit of the last printed digit, and what fp32 σ near 1 do to 1 − σ.
    assert bool(((ours - table).abs() <= places * 1.3).all()), (ours - table).abs().max(0).values
    assert steps.is_stochastic_S.tolist() == [True] * 9 + [False]
    assert (steps.A_S[9], steps.std_S[9]) == (1, 0)
    assert steps.B_S[9].item() == pytest.approx(-0.00893, abs=5e-6)
    torch.testing.assert_close(steps.time_S, 1000 * sigma_S1[:-1])


def test_dance_sde_on_the_schedule_of_flux():
    steps = flow_steps(shifted(16), kernel="dance_sde", level=0.3)
    std = {0: 0.04423, 4: 0.05331, 8: 0.06708, 12: 0.09045, 14: 0.10954}
    assert {i: round(steps.std_S[i].item(), 5) for i in std} == std
    c_S = steps.B_S.abs() / steps.std_S
    assert (round(c_S[0].item(), 3), round(c_S[14].item(), 3)) == (0.491, 1.345)
    # The report's .12247 of the last transition is what it would be, were it not the ODE.
    assert 0.3 * math.sqrt(shifted(16)[15]) == pytest.approx(0.12247, abs=5e-6)
    assert steps.std_S[15] == 0


def test_flow_sde_on_the_six_steps_of_flux():
    sigma_S1 = flux_sigmas()
    assert [round(sigma, 5) for sigma in sigma_S1.tolist()] == [1, 0.90374, 0.7897, 0.65249, 0.48422, 0.273, 0]
    steps = flow_steps(sigma_S1, kernel="flow_sde", level=0.9)
    assert [round(std, 3) for std in steps.std_S.tolist()] == [0.9, 0.931, 0.646, 0.506, 0.401, 0]
    c_S = steps.B_S.abs() / steps.std_S
    assert [round(c, 3) for c in c_S[:5].tolist()] == [0.107, 0.172, 0.298, 0.467, 0.740]


@pytest.mark.parametrize("level", [0.3, 0.7, 0.9, 1.2])
@pytest.mark.parametrize("sigma_S1", [sd35_sigmas(), shifted(16), shifted(4, 7.0), flux_sigmas()])
def test_first_step_of_flow_sde_does_not_depend_on_the_schedule(sigma_S1: Tensor, level: float):
    steps = flow_steps(sigma_S1, kernel="flow_sde", level=level)
    assert steps.std_S[0].item() == pytest.approx(level, rel=1e-6)
    assert steps.A_S[0].item() == pytest.approx(1 - level**2 / 2, rel=1e-6)


def test_dance_equals_flow_where_their_noise_is_equal():
    sigma_S1 = shifted(12)
    for i in range(1, 11):
        sigma = sigma_S1[i].item()
        flow = flow_steps(sigma_S1, kernel="flow_sde", level=0.7)
        dance = flow_steps(sigma_S1, kernel="dance_sde", level=0.7 * math.sqrt(sigma / (1 - sigma)))
        torch.testing.assert_close(torch.stack(dance.at(i)), torch.stack(flow.at(i)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kernel", ["ode", "dance_sde", "flow_sde"])
def test_level_0_is_the_euler_step_of_diffusers(kernel: str):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    steps = flow_steps(scheduler.sigmas, kernel=kernel, level=0.0)
    assert not steps.is_stochastic_S.any()
    x = theirs = randn(2, 4, 8, 8)
    for i, t in enumerate(scheduler.timesteps):
        out = randn(2, 4, 8, 8, seed=i + 1)
        assert steps.time_S[i] == t
        theirs = scheduler.step(out, t, theirs, return_dict=False)[0]
        A, B, std = steps.at(i)
        x = kernels.sample(kernels.transition(x, out, A, B), std, randn(2, 4, 8, 8, seed=100))
        torch.testing.assert_close(x, theirs, rtol=1e-6, atol=1e-6)


def test_outside_its_window_a_run_is_the_ode():
    sigma_S1 = sd35_sigmas()
    inside = torch.tensor([False] * 2 + [True] * 3 + [False] * 5)
    steps = flow_steps(sigma_S1, kernel="flow_sde", level=0.7, stochastic_S=inside)
    sde, ode = flow_steps(sigma_S1, kernel="flow_sde", level=0.7), flow_steps(sigma_S1, kernel="ode")
    assert torch.equal(steps.is_stochastic_S, inside)
    for name in ("A_S", "B_S", "std_S"):
        mixed = torch.where(inside, getattr(sde, name), getattr(ode, name))
        assert torch.equal(getattr(steps, name), mixed), name


def test_step_follows_from_the_score_of_the_predicted_clean_latents():
    """x − Δv + ½ g² Δ s with s = −(x − (1 − σ) x̂₀) / σ², x̂₀ = x − σ v: written out, float64."""
    sigma_S1 = shifted(10)
    x, v = randn(2, 3, 4, 4, dtype=torch.float64), randn(2, 3, 4, 4, seed=1, dtype=torch.float64)
    for kernel, g_of in (("dance_sde", lambda s: 0.3), ("flow_sde", lambda s: 0.7 * math.sqrt(s / (1 - s)))):
        steps = flow_steps(sigma_S1, kernel=kernel, level=0.3 if kernel == "dance_sde" else 0.7)
        for i in range(1, 9):
            sigma, delta = sigma_S1[i].item(), (sigma_S1[i] - sigma_S1[i + 1]).item()
            clean = x - sigma * v
            noise = x + (1 - sigma) * v
            score = -(x - (1 - sigma) * clean) / sigma**2
            torch.testing.assert_close(score, -noise / sigma)
            expected = x - delta * v + 0.5 * g_of(sigma) ** 2 * delta * score
            A, B, std = steps.at(i)
            torch.testing.assert_close(kernels.transition(x, v, A, B), expected, rtol=0, atol=1e-6)
            assert std.item() == pytest.approx(g_of(sigma) * math.sqrt(delta), rel=1e-6)


def test_sigma_1_is_noise_and_0_is_data():
    schedule = FlowSchedule(shift=1.0)
    x0, noise = randn(4, 3, 4, 4), randn(4, 3, 4, 4, seed=1)
    sigma_N = torch.tensor([1.0, 0.7, 0.3, 0.0])
    x = schedule.noised(x0, noise, sigma_N)
    assert torch.equal(x[0], noise[0])
    assert torch.equal(x[3], x0[3])
    v = schedule.target(x0, noise, sigma_N)
    for i in (0, 1, 2):
        # From any σ one ODE step with the exact velocity reaches the data.
        A, B, _ = flow_steps(torch.stack([sigma_N[i], torch.tensor(0.0)]), kernel="ode").at(0)
        torch.testing.assert_close(kernels.transition(x[i : i + 1], v[i : i + 1], A, B), x0[i : i + 1])


# --- what the SDEs leave invariant ------------------------------------------------------------------------------------


def final_moments(steps: Steps, sigma_S1: Tensor, mean0: float = 0.3, var0: float = 0.25) -> tuple[float, float]:
    """Mean and variance of the samples of x₀ ~ N(mean0, var0) under its exact velocity: a linear recursion, no sampling."""
    mean, var = 0.0, 1.0
    for i in range(len(steps)):
        sigma = sigma_S1[i].item()
        A, B, std = (float(value) for value in steps.at(i))
        slope = (sigma - (1 - sigma) * var0) / ((1 - sigma) ** 2 * var0 + sigma**2)
        mean = A * mean + B * (-mean0 + slope * (mean - (1 - sigma) * mean0))
        var = (A + B * slope) ** 2 * var + std**2
    return mean, var


def noisy_to_the_end(steps: Steps, sigma_S1: Tensor, g: float) -> Steps:
    """The same run with noise in its last transition as well."""
    sigma = sigma_S1[-2].item()
    last = (1 - g**2 / 2, -sigma * (1 + g**2 * (1 - sigma) / (2 * sigma)), g * math.sqrt(sigma))
    A_S, B_S, std_S = (
        torch.cat([values[:-1], torch.tensor([end], dtype=torch.float32)])
        for values, end in zip((steps.A_S, steps.B_S, steps.std_S), last, strict=True)
    )
    return Steps(A_S, B_S, std_S, steps.time_S, steps.is_stochastic_S)


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [
        (10, (0.1367, 0.1801, 0.1484)),
        (50, (0.2224, 0.2339, 0.2253)),
        (400, (0.2464, 0.2486, 0.2468)),
        (2000, (0.2493, 0.2500, 0.2494)),
    ],
)
def test_marginal_variance_of_a_gaussian(num_steps: int, expected: tuple[float, ...]):
    """ODE, Flow-SDE 0.7 and Dance-SDE 0.3. The tabulated variances have noise in the last transition too; ours has not."""
    sigma_S1 = shifted(num_steps)
    last = sigma_S1[-2].item()
    g_last = (0.0, 0.7 * math.sqrt(last / (1 - last)), 0.3)
    runs = zip([("ode", 0.0), ("flow_sde", 0.7), ("dance_sde", 0.3)], g_last, expected, strict=True)
    for (kernel, level), g, tabulated in runs:
        steps = flow_steps(sigma_S1, kernel=kernel, level=level)
        mean, variance = final_moments(noisy_to_the_end(steps, sigma_S1, g), sigma_S1)
        assert round(variance, 4) == tabulated, kernel
        assert mean == pytest.approx(0.3, abs=1e-6), kernel
        mean, variance = final_moments(steps, sigma_S1)
        assert mean == pytest.approx(0.3, abs=1e-6), kernel
        # One step to clean data leaves out g² σ of noise, no more.
        assert tabulated - g**2 * last - 5e-5 <= variance <= tabulated + 5e-5, kernel
        if num_steps >= 2000:
            assert abs(variance - 0.25) < 1e-3, kernel


# --- log-probs and KL -------------------------------------------------------------------------------------------------


def test_log_prob_is_the_mean_of_the_normal_density():
    mean, x_next = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1)
    std_B = torch.tensor([0.05, 0.7, 2.0])
    expected = torch.distributions.Normal(mean, std_B.view(3, 1, 1, 1)).log_prob(x_next).flatten(1).mean(1)
    torch.testing.assert_close(kernels.log_prob(x_next, mean, std_B), expected)
    # At the mean itself: −ln std − ½ ln 2π.
    torch.testing.assert_close(kernels.log_prob(mean, mean, std_B), -std_B.log() - HALF_LOG_2PI)


def test_log_prob_of_video_and_of_vectors():
    std_B = torch.tensor([0.2, 0.4])
    for shape in [(2, 5), (2, 3, 2, 4, 4)]:
        assert kernels.log_prob(randn(*shape), randn(*shape, seed=1), std_B).shape == (2,)


def test_samples_of_one_batch_may_be_at_different_steps():
    steps = flow_steps(sd35_sigmas(), kernel="flow_sde", level=0.7)
    x, out, noise = (randn(3, 4, 4, 4, seed=seed) for seed in range(3))
    index_B = torch.tensor([7, 0, 3])
    A_B, B_B, std_B = steps.at(index_B)
    mean = kernels.transition(x, out, A_B, B_B)
    x_next = kernels.sample(mean, std_B, noise)
    log_prob_B = kernels.log_prob(x_next, mean, std_B)
    for b, i in enumerate(index_B.tolist()):
        A, B, std = steps.at(i)
        alone = kernels.transition(x[b : b + 1], out[b : b + 1], A, B)
        torch.testing.assert_close(mean[b : b + 1], alone, rtol=0, atol=0)
        torch.testing.assert_close(x_next[b : b + 1], kernels.sample(alone, std, noise[b : b + 1]), rtol=0, atol=0)
        torch.testing.assert_close(log_prob_B[b : b + 1], kernels.log_prob(x_next[b : b + 1], alone, std))


def test_log_prob_sends_gradient_to_the_mean_alone():
    mean, x_next = randn(2, 3, 4, 4).requires_grad_(), randn(2, 3, 4, 4, seed=1).requires_grad_()
    std_B = torch.tensor([0.3, 0.6])
    kernels.log_prob(x_next, mean, std_B).sum().backward()
    assert x_next.grad is None
    expected = (x_next - mean).detach() / std_B.view(2, 1, 1, 1) ** 2 / 48
    torch.testing.assert_close(mean.grad, expected)


def test_low_precision_networks_are_widened_before_the_step():
    x, out = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1).bfloat16()
    A, B, std = flow_steps(sd35_sigmas(), kernel="flow_sde", level=0.7).at(4)
    mean = kernels.transition(x, out, A, B)
    assert mean.dtype == torch.float32
    assert torch.equal(mean, kernels.transition(x, out.float(), A, B))
    assert kernels.log_prob(x, mean, std).dtype == torch.float32


@pytest.mark.parametrize(("kernel", "level"), [("flow_sde", 0.7), ("dance_sde", 0.3)])
def test_kl_is_half_c_squared_times_the_squared_difference_of_outputs(kernel: str, level: float):
    steps = flow_steps(sd35_sigmas(), kernel=kernel, level=level)
    x, out, ref = (randn(2, 4, 8, 8, seed=seed, dtype=torch.float64) for seed in range(3))
    for i in range(9):
        A, B, std = steps.at(i)
        kl_B = kernels.gaussian_kl(kernels.transition(x, out, A, B), kernels.transition(x, ref, A, B), std)
        c = abs(B.item()) / std.item()
        torch.testing.assert_close(kl_B, 0.5 * c**2 * (out - ref).square().flatten(1).mean(1), rtol=1e-5, atol=0)


def test_kl_of_flow_sde_is_the_published_form():
    """½ Δ (g(1 − σ)/(2σ) + 1/g)² ‖v − v_ref‖², Flow-GRPO."""
    sigma_S1 = sd35_sigmas().double()
    steps = flow_steps(sigma_S1, kernel="flow_sde", level=0.7)
    for i in range(1, 9):
        sigma, delta = sigma_S1[i].item(), (sigma_S1[i] - sigma_S1[i + 1]).item()
        g = 0.7 * math.sqrt(sigma / (1 - sigma))
        factor = 0.5 * delta * (g * (1 - sigma) / (2 * sigma) + 1 / g) ** 2
        assert 0.5 * (steps.B_S[i] / steps.std_S[i]).item() ** 2 == pytest.approx(factor, rel=1e-5)


def test_expected_log_ratio_is_minus_the_kl():
    """Under the old policy, per element. A pair of noises ±z cancels the term linear in z, so two samples are exact."""
    mean, new = randn(2, 4, 8, 8, dtype=torch.float64), randn(2, 4, 8, 8, seed=1, dtype=torch.float64)
    std_B, noise = torch.tensor([0.4, 0.9], dtype=torch.float64), randn(2, 4, 8, 8, seed=2, dtype=torch.float64)
    log_ratio = [
        kernels.log_prob(x_next, new, std_B) - kernels.log_prob(x_next, mean, std_B)
        for x_next in (kernels.sample(mean, std_B, noise), kernels.sample(mean, std_B, -noise))
    ]
    torch.testing.assert_close((log_ratio[0] + log_ratio[1]) / 2, -kernels.gaussian_kl(new, mean, std_B))


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": "euler"}, "kernel 'euler'"),
        ({"kernel": "flow_sde", "level": -0.1}, "level = -0.1"),
        ({"kernel": "flow_sde", "level": math.nan}, "level = nan"),
        ({"kernel": "dance_sde", "level": math.inf}, "level = inf"),
        ({"kernel": "ode", "level": 0.3}, "the ode kernel injects no noise"),
        ({"kernel": "flow_sde", "level": 0.7, "stochastic_S": torch.ones(10, dtype=torch.bool)}, "last transition"),
        (
            {"kernel": "flow_sde", "level": 0.7, "stochastic_S": torch.zeros(9, dtype=torch.bool)},
            "each of the 10 steps",
        ),
        ({"kernel": "flow_sde", "level": 0.7, "stochastic_S": torch.zeros(10)}, "each of the 10 steps"),
    ],
)
def test_flow_steps_refuse(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        flow_steps(sd35_sigmas(), **arguments)


@pytest.mark.parametrize(
    "sigmas",
    [[1.0], [1.0, 0.5], [1.0, 0.5, 0.6, 0.0], [1.2, 0.5, 0.0], [0.0, 0.5, 1.0], [1.0, math.nan, 0.0], [[1.0, 0.0]]],
)
def test_flow_steps_refuse_sigmas_that_do_not_fall_from_noise_to_data(sigmas: list):
    with pytest.raises(ValueError, match="sigmas"):
        flow_steps(torch.tensor(sigmas), kernel="ode")
