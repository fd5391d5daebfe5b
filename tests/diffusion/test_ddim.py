"""DDIM-η: parity with diffusers' samplers, the three prediction types, its marginals, zero terminal SNR.

Shape legend: S = N steps, C/h/w latents.
"""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler

from mmalign.diffusion import kernels
from mmalign.diffusion.kernels import ddim_steps
from mmalign.diffusion.schedule import Schedule

from .samplers import ddim, randn


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("prediction_type", "config"),
    [
        ("epsilon", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("epsilon", {"timestep_spacing": "trailing"}),
        ("v_prediction", {"timestep_spacing": "trailing"}),
        ("v_prediction", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
        ("sample", {"timestep_spacing": "trailing"}),
    ],
)
def test_ddim_is_the_sampler_of_diffusers(prediction_type: str, config: dict, eta: float):
    scheduler = ddim(prediction_type, **config)
    scheduler.set_timesteps(10)
    # In fp32 its own √(1 − ᾱ' − std²) is off by 1e-3 at zero SNR, where both are .9999.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    steps = ddim_steps(Schedule.from_scheduler(scheduler), scheduler.timesteps, eta=eta)
    assert steps.is_stochastic_S.tolist() == [eta > 0] * 9 + [False]
    x = theirs = randn(2, 4, 8, 8, dtype=torch.float64)
    for i, t in enumerate(scheduler.timesteps):
        out, noise = (randn(2, 4, 8, 8, seed=2 * i + n, dtype=torch.float64) for n in (1, 2))
        theirs = scheduler.step(out, t, theirs, eta=eta, variance_noise=noise, return_dict=False)[0]
        A, B, std = steps.at(i)
        assert steps.time_S[i] == t
        x = kernels.sample(kernels.transition(x, out, A, B), std, noise)
        torch.testing.assert_close(x, theirs, rtol=0, atol=1e-6 * max(theirs.abs().max().item(), 1))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_eta_1_is_the_ancestral_posterior_of_ddpm(prediction_type: str):
    scheduler = DDPMScheduler.from_config(ddim(prediction_type, timestep_spacing="trailing").config)
    scheduler.set_timesteps(25)
    steps = ddim_steps(Schedule.from_scheduler(scheduler), scheduler.timesteps, eta=1.0)
    for i in range(24):
        x, out = randn(2, 4, 8, 8, seed=i), randn(2, 4, 8, 8, seed=i + 50)
        theirs = scheduler.step(out, scheduler.timesteps[i], x, generator=torch.Generator().manual_seed(i))
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        A, B, std = steps.at(i)
        ours = kernels.sample(kernels.transition(x, out, A, B), std, noise)
        torch.testing.assert_close(ours, theirs.prev_sample, rtol=1e-4, atol=1e-4)


def test_ddim_steps_of_eps_v_and_x0_networks_that_agree_are_the_same():
    x0, noise = randn(2, 4, 4, 4, dtype=torch.float64), randn(2, 4, 4, 4, seed=1, dtype=torch.float64)
    timestep_S = torch.tensor([900, 600, 300, 50])
    schedules = {
        kind: Schedule.from_scheduler(ddim(kind)) for kind in ("epsilon", "v_prediction", "sample")
    }  # fmt: skip
    for i, t in enumerate(timestep_S.tolist()):
        means = []
        for schedule in schedules.values():
            alpha, sigma = schedule.alpha_T[t].double(), schedule.sigma_T[t].double()
            x = alpha * x0 + sigma * noise
            out = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0}
            A, B, _ = ddim_steps(schedule, timestep_S, eta=0.8).at(i)
            means.append(kernels.transition(x, out[schedule.prediction_type], A, B))
        torch.testing.assert_close(means[1], means[0], rtol=0, atol=2e-6)
        torch.testing.assert_close(means[2], means[0], rtol=0, atol=2e-6)
    # The last transition gives the clean latents themselves.
    torch.testing.assert_close(means[0], x0, rtol=0, atol=2e-6)


def test_ddim_keeps_the_marginals_of_the_forward_process_at_any_eta():
    """With the exact ε of a known x₀: mean α'·x₀, variance σ'² at every step."""
    schedule = Schedule.from_scheduler(ddim("epsilon"))
    timestep_S = torch.arange(980, 0, -20)
    alpha_S, sigma_S = schedule.alpha_T[timestep_S].double(), schedule.sigma_T[timestep_S].double()
    for eta in (0.0, 0.3, 1.0):
        steps = ddim_steps(schedule, timestep_S, eta=eta)
        variance = sigma_S[0].item() ** 2
        for i in range(len(steps) - 1):
            A, B, std = (value.double() for value in steps.at(i))
            # ε̂ = (x − α x₀)/σ: x' = (A + B/σ) x + …, so the variance goes by that factor.
            variance = ((A + B / sigma_S[i]) ** 2 * variance + std**2).item()
            assert variance == pytest.approx(sigma_S[i + 1].item() ** 2, rel=1e-4)
            # E[x] = α x₀ makes E[ε̂] = 0, so the mean goes by A alone.
            assert (A * alpha_S[i] / alpha_S[i + 1]).item() == pytest.approx(1, rel=1e-5)


def test_ddim_at_zero_terminal_snr():
    scheduler = ddim("v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    steps = ddim_steps(Schedule.from_scheduler(scheduler), scheduler.timesteps, eta=1.0)
    schedule = Schedule.from_scheduler(scheduler)
    assert scheduler.timesteps[0] == 999
    assert schedule.alpha_T[999] == 0
    for values in (steps.A_S, steps.B_S, steps.std_S):
        assert torch.isfinite(values).all()
    # From pure noise the ancestral step forgets x: x' = α'·x̂₀ + σ'·z with x̂₀ = −v.
    assert steps.A_S[0] == pytest.approx(0, abs=1e-6)
    assert steps.B_S[0] == pytest.approx(-schedule.alpha_T[899].item(), rel=1e-6)
    assert steps.std_S[0] == pytest.approx(schedule.sigma_T[899].item(), rel=1e-6)
    epsilon = ddim("epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match=r"timestep 999 has zero SNR.*v_prediction"):
        ddim_steps(Schedule.from_scheduler(epsilon), scheduler.timesteps, eta=1.0)


@pytest.mark.parametrize(
    ("timesteps", "eta", "message"),
    [
        ([900, 400], 1.1, "eta = 1.1"),
        ([900, 400], -0.1, "eta = -0.1"),
        ([900, 400], math.nan, "eta = nan"),
        ([400, 900], 1.0, "must fall strictly within 0 to 999"),
        ([1000, 400], 1.0, "must fall strictly within 0 to 999"),
        ([400, 400], 1.0, "must fall strictly"),
        ([400, -1], 1.0, "must fall strictly"),
        ([400.5, 3.0], 1.0, "integer"),
        ([], 1.0, "at least one integer"),
    ],
)
def test_ddim_steps_refuse(timesteps: list, eta: float, message: str):
    with pytest.raises(ValueError, match=message):
        ddim_steps(Schedule.from_scheduler(ddim("epsilon")), torch.tensor(timesteps), eta=eta)
