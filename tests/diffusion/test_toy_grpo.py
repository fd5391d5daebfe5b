"""The whole chain on a plane: kernels, group advantages and the surrogate make a flow leave one mode for another.

Shape legend: N = B samples of a rollout on two coordinates, S trained steps. Each block of 16 samples is a group.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from mmalign.advantages import group_advantages
from mmalign.diffusion import kernels
from mmalign.diffusion.kernels import Steps, ddim_steps, flow_steps
from mmalign.diffusion.schedule import Schedule
from mmalign.losses.policy_gradient import clipped_surrogate
from mmalign.losses.reduce import masked_mean

MODES = torch.tensor([[1.5, 0.0], [-1.5, 0.0]])
SPREAD = 0.3
NUM_SAMPLES, GROUP = 64, 16


class Tilted(torch.nn.Module):
    """Exact prediction for two equal modes, plus a correction that starts at zero."""

    def __init__(self, schedule: Schedule | None) -> None:
        super().__init__()
        self.schedule = schedule
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.correction = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
        torch.nn.init.zeros_(self.correction[2].weight)
        torch.nn.init.zeros_(self.correction[2].bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """v of the flow, or ε where there is a schedule: both are linear in the posterior mean of x₀."""
        if self.schedule is None:
            alpha, sigma = 1 - time / 1000, time / 1000
        else:
            alpha, sigma = self.schedule.alpha_T[time.long()], self.schedule.sigma_T[time.long()]
        variance = alpha**2 * SPREAD**2 + sigma**2
        share = torch.softmax(-((x[:, None] - alpha * MODES) ** 2).sum(2) / (2 * variance), 1)
        gain = alpha * SPREAD**2 / variance
        clean = (share[:, :, None] * (MODES + gain * (x[:, None] - alpha * MODES))).sum(1)
        out = (x - clean) / sigma if self.schedule is None else (x - alpha * clean) / sigma
        return out + self.correction(torch.cat([x, (time / 1000).expand(len(x), 1)], 1))


def rollout(
    model: Tilted, steps: Steps, generator: torch.Generator
) -> tuple[Tensor, list[tuple[int, Tensor, Tensor, Tensor]]]:
    x = torch.randn(NUM_SAMPLES, 2, generator=generator)
    record = []
    with torch.no_grad():
        for i in range(len(steps)):
            A, B, std = steps.at(i)
            mean = kernels.transition(x, model(x, steps.time_S[i]), A, B)
            x_next = kernels.sample(mean, std, torch.randn(x.shape, generator=generator))
            if steps.is_stochastic_S[i]:
                record.append((i, x, x_next, kernels.log_prob(x_next, mean, std)))
            x = x_next
    return x, record


def train(steps: Steps, schedule: Schedule | None, sign: float = 1.0) -> tuple[float, float]:
    """Mean reward of the first and last five of 100 rollouts, 200 updates. The reward wants the right-hand mode."""
    model, generator = Tilted(schedule), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    group_N = torch.arange(NUM_SAMPLES) // GROUP
    history = []
    for _ in range(100):
        x, record = rollout(model, steps, generator)
        reward_N = -(x - MODES[0]).norm(dim=1)
        history.append(reward_N.mean().item())
        advantages = group_advantages(sign * reward_N[:, None], [1.0], group_N)
        for _ in range(2):  # the second update of a rollout is off-policy
            new_BS = torch.stack(
                [
                    kernels.log_prob(
                        x_next, kernels.transition(x, model(x, steps.time_S[i]), *steps.at(i)[:2]), steps.std_S[i]
                    )
                    for i, x, x_next, _ in record
                ],
                1,
            )
            old_BS = torch.stack([old_B for *_, old_B in record], 1)
            loss_BS = clipped_surrogate(new_BS, old_BS, advantages.value_N, clip_range=0.1)
            optimizer.zero_grad()
            masked_mean(loss_BS, advantages.weight_N).backward()
            optimizer.step()
    return sum(history[:5]) / 5, sum(history[-5:]) / 5


def runs() -> dict[str, tuple[Steps, Schedule | None]]:
    line = torch.linspace(1, 0, 11, dtype=torch.float64)
    inside = torch.tensor([False, True, True, True] + [False] * 6)
    schedule = Schedule.from_scheduler(DDIMScheduler(clip_sample=False))
    return {
        "flow_sde": (flow_steps(line, kernel="flow_sde", level=0.7), None),
        "dance_sde": (flow_steps(line, kernel="dance_sde", level=0.7), None),
        "flow_sde in a window": (flow_steps(line, kernel="flow_sde", level=0.7, stochastic_S=inside), None),
        "ddim": (ddim_steps(schedule, torch.arange(901, 0, -100), eta=1.0), schedule),
    }


@pytest.mark.parametrize("run", ["flow_sde", "dance_sde", "flow_sde in a window", "ddim"])
def test_200_updates_raise_the_reward_on_a_mixture(run: str):
    steps, schedule = runs()[run]
    before, after = train(steps, schedule)
    # Half of the samples are in the wrong mode, 3 away.
    assert before == pytest.approx(-1.7, abs=0.3)
    assert after > -0.5


def test_the_reward_with_its_sign_flipped_lowers_it():
    steps, schedule = runs()["flow_sde"]
    before, after = train(steps, schedule, sign=-1.0)
    assert after < before - 0.7
