"""Rollouts as the shipped recipes ask for them, on the tiny policies: windows, fractions, shared noise, the zero prompt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.builtin import builtin_path
from mmalign.config import DataConfig, ModelConfig, load_config
from mmalign.data.features import make_features
from mmalign.data.groups import Groups
from mmalign.losses import clipped_surrogate
from mmalign.policies.load import load_policy
from mmalign.run.preflight import probe_rollout
from mmalign.trainers.grpo import GroupPolicyGradient
from mmalign.types import DrawKey, Row

TINY = {
    "sdxl": {"family": "sdxl", "path": "builtin:sdxl-tiny"},
    "sd3": {"family": "sd3", "path": "builtin:sd3-tiny", "max_sequence_length": 8},
}
PROMPTS = ["a large red circle on a white background", "a small blue cross on a gray background"]


def shipped(family: str) -> tuple[Any, GroupPolicyGradient, Groups]:
    """The tiny policy, with the recipe's method as it is and the groups that it deals."""
    recipe = load_config(f"{family}/dance_grpo_lora.yaml").config
    method = GroupPolicyGradient(**recipe.method.options())
    policy = load_policy(ModelConfig(**TINY[family]), device="cpu")
    rows = [Row(f"r{n}", prompt, source=f"f:{n}") for n, prompt in enumerate(PROMPTS * 8)]
    data = DataConfig(path="unused", cache=False)
    return policy, method, Groups.of(method, rows, make_features(policy, data, None, seed=0, rows=rows), recipe.train)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_replay_of_the_shipped_settings_is_the_rollout(family: str):
    """DDIM, 25 steps, a window of 8, guidance 5; Dance-SDE, 16 steps, 60 % of them: log-probs as recorded, loss −A."""
    policy, method, groups = shipped(family)
    samples = groups.samples(3)[method.group_size - 2 : method.group_size + 2]  # two of each group
    trajectory = method.rollout(policy, groups, samples, 3)
    steps, index_BS = trajectory.steps, trajectory.index_BS
    if family == "sdxl":
        assert (method.kernel, len(steps), method.guidance_scale) == ("ddim", 25, 5.0)
        assert index_BS.shape == (4, 8)
        assert bool((index_BS.diff(dim=1) == 1).all()), "one window"
        assert int(index_BS.max()) < 16
        assert steps.is_stochastic_S.nonzero().flatten().tolist() == index_BS[0].tolist(), "an ODE outside of it"
        assert torch.equal(steps.std_S > 0, steps.is_stochastic_S)
    else:
        assert (method.kernel, len(steps), method.guidance_scale) == ("dance_sde", 16, 1.0)
        sigma_S = torch.cat([steps.time_S / 1000, torch.zeros(1)])
        torch.testing.assert_close(steps.std_S[:-1], 0.3 * (-sigma_S.diff()[:-1]).sqrt(), rtol=1e-4, atol=0)
        assert index_BS.shape == (4, 9), "60 % of the 15 stochastic steps"
        assert len({tuple(sorted(row)) for row in index_BS.tolist()}) > 1, "drawn per sample"
    assert method.shared_noise
    first, second, third, _ = (sample.first_key for sample in samples)
    assert first == second != third
    replay = policy.replayer(trajectory)
    advantage_B = torch.tensor([1.0, -1.0, 0.5, -0.5])
    with torch.no_grad():
        seen_BS = torch.stack([replay(column).log_prob_B for column in range(index_BS.shape[1])], dim=1)
    assert float((seen_BS - trajectory.log_prob_BS).abs().max()) < 1e-6
    loss_BS = clipped_surrogate(seen_BS, trajectory.log_prob_BS, advantage_B, clip_range=method.clip_range)
    torch.testing.assert_close(loss_BS, -advantage_B[:, None].expand_as(loss_BS), rtol=1e-5, atol=0)
    assert probe_rollout(policy, trajectory, dtype="fp32")


def test_shared_noise_starts_a_group_from_one_picture():
    """Recorded from the first step, the latents of a group are equal there and differ after it."""
    policy, method, groups = shipped("sd3")
    steps = method.steps(policy, 0, 0)
    samples = groups.samples(0)[method.group_size - 2 : method.group_size + 1]
    trajectory = policy.rollout(
        groups.contexts(samples),
        keys=[sample.key for sample in samples],
        first_keys=[sample.first_key for sample in samples],
        steps=steps,
        index_BS=torch.zeros(3, 1, dtype=torch.int64),
        guidance_scale=1.0,
    )
    start, after = trajectory.x[:, 0], trajectory.next[:, 0]
    assert torch.equal(start[0], start[1])
    assert not torch.equal(start[0], start[2])
    assert not torch.allclose(after[0], after[1])


@pytest.mark.parametrize("zeros", [True, False])
def test_the_empty_prompt_is_what_the_pipeline_makes_of_it(tmp_path: Path, zeros: bool):
    """`force_zeros_for_empty_prompt`, which the published SDXL base sets: under guidance the stock pipeline's latents."""
    folder = tmp_path / "sdxl"
    shutil.copytree(builtin_path("builtin:sdxl-tiny"), folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": zeros}))
    policy = load_policy(ModelConfig(family="sdxl", path=str(folder)), device="cpu", train=False)
    assert all(bool(value.any()) != zeros for value in policy.unconditional().values())
    key = [DrawKey(3, "x", 0)]
    trajectory = policy.rollout(
        policy.encode_prompts(PROMPTS[:1]),
        keys=key,
        first_keys=key,
        steps=policy.rollout_steps(kernel="ode", level=0.0, num_steps=5),
        index_BS=torch.zeros(1, 0, dtype=torch.int64),
        guidance_scale=5.0,
    )
    expected = policy.pipe(
        prompt=PROMPTS[0],
        latents=policy.noise(policy.latent_shape, "rollout start", key),
        height=policy.resolution,
        width=policy.resolution,
        guidance_scale=5.0,
        num_inference_steps=5,
        output_type="latent",
        return_dict=False,
    )[0]
    assert float((trajectory.latents - expected).abs().max()) < 2e-4
