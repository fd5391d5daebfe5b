"""A replay gives the recorded log-probs, and a wrong σ, a dropped guidance and rounded latents do not.

Shape legend: B samples, C/h/w latents.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmalign.diffusion import kernels
from mmalign.diffusion.kernels import ddim_steps, flow_steps
from mmalign.diffusion.schedule import Schedule

from .samplers import ddim, randn, sd35_sigmas, shifted


class Network(torch.nn.Module):
    """A small conditional denoiser: enough structure that σ and the prompt matter, fp32."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = torch.nn.ModuleList(
                [torch.nn.Conv2d(5, 16, 3, padding=1), torch.nn.Conv2d(16, 4, 3, padding=1)]
            )
            self.prompt = torch.nn.Embedding(3, 16)

    def forward(self, x: Tensor, time_B: Tensor, prompt_B: Tensor) -> Tensor:
        time = (time_B / 1000).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        hidden = self.layers[0](torch.cat([x, time], 1)) + self.prompt(prompt_B)[:, :, None, None]
        return self.layers[1](torch.tanh(hidden))

    def guided(self, x: Tensor, time_B: Tensor, prompt_B: Tensor, scale: float) -> Tensor:
        with_prompt, without = self(x, time_B, prompt_B), self(x, time_B, torch.zeros_like(prompt_B))
        return without + scale * (with_prompt - without)


RUNS = {
    "flow_sde": lambda: flow_steps(sd35_sigmas(), kernel="flow_sde", level=0.7),
    "dance_sde": lambda: flow_steps(shifted(10), kernel="dance_sde", level=0.3),
    "ddim": lambda: ddim_steps(Schedule.from_scheduler(ddim("epsilon")), torch.arange(901, 0, -100), eta=1.0),
}


@pytest.mark.parametrize("run", list(RUNS))
def test_replay_gives_the_recorded_log_probs_and_notices_every_planted_fault(run: str):
    steps, network, prompt_B = RUNS[run](), Network(), torch.tensor([1, 2, 1])
    x = randn(3, 4, 16, 16)
    record = []
    with torch.no_grad():
        for i in range(len(steps)):
            time_B, (A, B, std) = steps.time_S[i].expand(3), steps.at(i)
            mean = kernels.transition(x, network.guided(x, time_B, prompt_B, 3.0), A, B)
            x_next = kernels.sample(mean, std, randn(3, 4, 16, 16, seed=i + 1))
            if steps.is_stochastic_S[i]:
                record.append((i, x, x_next, kernels.log_prob(x_next, mean, std)))
            x = x_next
    assert len(record) == 9

    def difference(
        i, x, x_next, old_B, *, shift: int = 0, scale: float = 3.0, cast: torch.dtype | None = None
    ) -> float:
        index_B = torch.full((3,), i)
        A_B, B_B, std_B = steps.at(index_B)
        out = network.guided(x, steps.time_S[index_B + shift], prompt_B, scale)
        kept = x_next if cast is None else x_next.to(cast).float()
        new_B = kernels.log_prob(kept, kernels.transition(x, out, A_B, B_B), std_B)
        return (new_B - old_B).abs().max().item()

    assert max(difference(*entry) for entry in record) < 1e-6
    faults = {"wrong σ": {"shift": 1}, "guidance dropped": {"scale": 1.0}, "bf16 latents": {"cast": torch.bfloat16}}
    for name, fault in faults.items():
        found = [difference(*entry, **fault) for entry in record]
        assert max(found) > 1e-5, name
        assert sorted(found)[len(found) // 2] > 1e-6, name


def test_bf16_latents_bias_dance_sde_beyond_its_clip_range():
    """Rounding x and x' to bf16 shifts every step's log-prob down by more than the 1e-4 that DanceGRPO clips at."""
    steps = flow_steps(shifted(16), kernel="dance_sde", level=0.3)
    x, out, noise = (randn(1, 16, 64, 64, seed=seed) for seed in range(3))
    shift = []
    for i in range(15):
        A, B, std = steps.at(i)
        mean = kernels.transition(x, out, A, B)
        x_next = kernels.sample(mean, std, noise)
        rounded = kernels.transition(x.bfloat16(), out, A, B)
        replayed = kernels.log_prob(x_next.bfloat16(), rounded, std)
        shift.append((replayed - kernels.log_prob(x_next, mean, std)).item())
    assert max(shift) < -1e-4
    assert min(shift) > -3e-3
