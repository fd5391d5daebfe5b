"""Group-relative policy gradient on denoising steps: DanceGRPO, Flow-GRPO and their windowed variants.

The same clipped surrogate for every kernel; what differs between the published recipes are settings (configs/presets).
Shape legend: B samples of a micro-batch, S recorded steps, N samples of a rollout, K rewards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmalign.advantages import Advantages, Combine, Spread, group_advantages
from mmalign.data.groups import Groups, GroupSample
from mmalign.diffusion.kernels import Steps, gaussian_kl, random_subset, window
from mmalign.losses.policy_gradient import clipped_surrogate, ratio_stats
from mmalign.policies.base import StepPolicy
from mmalign.policies.rollouts import Replay, Trajectory
from mmalign.run.panel import Rewards
from mmalign.types import DataError, LossPart, Row


class GroupPolicyGradient:
    """Sample G images per prompt, score them, and make the steps of the better ones likelier.

    Args:
        kernel: how noise enters a step: `ddim` (diffusion models), `dance_sde` or `flow_sde` (flow models).
        level: of that noise: η of DDIM (1) and of Dance-SDE (0.3), a of Flow-SDE (0.7).
        num_steps: denoising steps of a rollout.
        guidance_scale: classifier-free guidance in rollout and update; 1 is without. Above 1 both branches are trained.
        group_size: G samples per prompt. prompts_per_rollout: P prompts per rollout.
        updates_per_rollout: optimizer steps per rollout; each takes P·G / updates samples.
        step_fraction: share of a sample's steps that is trained, drawn per sample (DanceGRPO: 0.6).
        window_size: instead of `step_fraction`: so many consecutive stochastic steps, the rest of the run an ODE.
        window_low, window_high: range of steps the window is drawn from, `window_high` exclusive; default all but the last.
        shared_noise: start all samples of a group from one noise (needed for video, not for images).
        clip_range: of the ratio, in the unit of log-probs averaged over latent elements.
        combine: `advantages` normalises each reward in its group, then adds them up; `rewards` adds up first.
        advantage_std: divide by the `group`'s deviation, the `global` one, or `none`.
        advantage_epsilon: added to that deviation. advantage_clip: bound of |A|.
        best_of: train only the best and worst half of so many samples of each group.
        kl_weight: weight of the KL to the reference per step (mean over elements); 0 asks for no reference forward.
    """

    loop = "online"
    needs_negative = False
    sides = ()
    step_losses = (clipped_surrogate,)
    unread = (
        "model.timestep_density",
        "model.timestep_shift",
        "train.accumulate",
        "train.num_draws",
        "train.score_chunk",
        "train.stop",
        "data.cache_reference",
        "data.swap",
        "data.label_noise",
        "data.crop",
        "data.num_crops",
        "data.flip",
        "data.size_ids",
        "data.prompt_dropout",
        "data.num_workers",
    )

    def __init__(
        self,
        *,
        kernel: str,
        level: float,
        num_steps: int,
        guidance_scale: float = 1.0,
        group_size: int = 12,
        prompts_per_rollout: int = 8,
        updates_per_rollout: int = 1,
        step_fraction: float | None = None,
        window_size: int | None = None,
        window_low: int = 0,
        window_high: int | None = None,
        shared_noise: bool = False,
        clip_range: float | tuple[float, float] = 1e-4,
        combine: Combine = "advantages",
        advantage_std: Spread = "group",
        advantage_epsilon: float = 1e-8,
        advantage_clip: float | None = 5.0,
        best_of: int | None = None,
        kl_weight: float = 0.0,
    ) -> None:
        if kernel not in ("ddim", "dance_sde", "flow_sde"):
            raise ValueError(f"kernel {kernel!r}: must be ddim, dance_sde or flow_sde (an ODE has no log-probs)")
        if not level > 0:
            raise ValueError(f"level = {level}: must be positive, without noise there are no log-probs")
        for name, value, least in (
            ("num_steps", num_steps, 2),
            ("group_size", group_size, 2),
            ("prompts_per_rollout", prompts_per_rollout, 1),
            ("updates_per_rollout", updates_per_rollout, 1),
        ):
            if value < least:
                raise ValueError(f"{name} = {value}: must be at least {least}")
        if not guidance_scale >= 1:
            raise ValueError(f"guidance_scale = {guidance_scale}: must be at least 1 (1 is without guidance)")
        if window_size is not None and step_fraction is not None:
            raise ValueError("step_fraction and window_size are two ways to choose the trained steps: give one of them")
        if window_size is None and (window_low or window_high is not None):
            raise ValueError("window_low and window_high would do nothing without window_size")
        if kl_weight < 0:
            raise ValueError(f"kl_weight = {kl_weight}: must not be negative")
        self.kernel, self.level, self.num_steps, self.guidance_scale = kernel, level, num_steps, guidance_scale
        self.group_size, self.prompts_per_rollout = group_size, prompts_per_rollout
        self.updates_per_rollout, self.shared_noise = updates_per_rollout, shared_noise
        self.step_fraction = step_fraction if step_fraction is not None or window_size is not None else 1.0
        self.window_size, self.window_low, self.window_high = window_size, window_low, window_high
        self.clip_range, self.kl_weight, self.needs_reference = clip_range, kl_weight, kl_weight > 0
        self.combine, self.std, self.epsilon = combine, advantage_std, advantage_epsilon
        self.clip, self.best_of = advantage_clip, best_of
        # Settings out of range fail now, not after the first rollout.
        clipped_surrogate(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), clip_range=clip_range)
        self.advantages(Rewards(("probe",), (1.0,), torch.tensor([[0.0], [1.0]]), torch.tensor([0, 0]), 1, [], 0.0))
        self.window(0, 0)
        if self.step_fraction is not None:
            random_subset(0, 0, ["probe"], num_steps, fraction=self.step_fraction)

    def check_rows(self, rows: Sequence[Row]) -> None:
        """Raises `DataError` naming a row without a prompt."""
        empty = next((row for row in rows if not row.prompt.strip()), None)
        if empty is not None:
            raise DataError(f"{empty.source}: the prompt is empty; online methods learn from prompts")

    def window(self, seed: int, iteration: int) -> Tensor | None:
        """Where this iteration's rollout injects noise, bool `[N steps]`; None: everywhere but the last step."""
        if self.window_size is None:
            return None
        return window(
            seed, iteration, self.num_steps, size=self.window_size, low=self.window_low, high=self.window_high
        )

    def steps(self, policy: StepPolicy, seed: int, iteration: int) -> Steps:
        """The transitions of an iteration, the same for all its samples."""
        return policy.rollout_steps(
            kernel=self.kernel, level=self.level, num_steps=self.num_steps, stochastic_S=self.window(seed, iteration)
        )

    def recorded(self, steps: Steps, seed: int, iteration: int, samples: Sequence[GroupSample]) -> Tensor:
        """Which steps of each sample are trained, `[B, S]`."""
        if self.step_fraction is not None:
            ids = [sample.id for sample in samples]
            return random_subset(seed, iteration, ids, self.num_steps, fraction=self.step_fraction)
        return steps.is_stochastic_S.nonzero().T.expand(len(samples), -1)

    def rollout(self, policy: StepPolicy, groups: Groups, samples: Sequence[GroupSample], iteration: int) -> Trajectory:
        """Draw one micro-batch of samples and record the steps that will be trained."""
        steps = self.steps(policy, groups.seed, iteration)
        return policy.rollout(
            groups.contexts(samples),
            keys=[sample.key for sample in samples],
            first_keys=[sample.first_key for sample in samples],
            steps=steps,
            index_BS=self.recorded(steps, groups.seed, iteration, samples),
            guidance_scale=self.guidance_scale,
        )

    def advantages(self, rewards: Rewards) -> Advantages:
        """`[N]` advantages and weights, the same on every process."""
        return group_advantages(
            rewards.reward_NK,
            rewards.weight_K,
            rewards.group_N,
            names=rewards.names,
            combine=self.combine,
            std=self.std,
            epsilon=self.epsilon,
            clip=self.clip,
            best_of=self.best_of,
        )

    def loss(
        self, replay: Replay, old_log_prob_B: Tensor, advantage_B: Tensor, reference_mean: Tensor | None
    ) -> LossPart:
        """Unreduced loss `[B]` of one recorded step."""
        new_B1, old_B1 = replay.log_prob_B[:, None], old_log_prob_B[:, None]
        loss_B = clipped_surrogate(new_B1, old_B1, advantage_B, clip_range=self.clip_range)[:, 0]
        stats = ratio_stats(new_B1, old_B1, clip_range=self.clip_range)
        metrics = {
            "ratio": stats.ratio_BS[:, 0],
            "clipped_low": stats.clipped_low_BS[:, 0],
            "clipped_high": stats.clipped_high_BS[:, 0],
            "approx_kl": stats.approx_kl_BS[:, 0],
        }
        if reference_mean is not None:
            kl_B = gaussian_kl(replay.mean, reference_mean, replay.std_B)
            loss_B = loss_B + self.kl_weight * kl_B
            metrics["kl"] = kl_B.detach()
        return LossPart(loss_B, metrics)
