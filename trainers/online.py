"""The loop over rollouts of the policy, visible from the first sample to the last checkpoint.

    rollout -> reward -> advantage -> replay -> loss -> backward -> clip -> step -> ema -> log -> preview -> checkpoint

The method decides which steps are sampled and how rewards become a loss; the policy knows how to sample and replay.
An iteration is one rollout and its updates. Checkpoints are written between iterations only, and everything inside one is
a function of (seed, iteration): a run killed while it samples, scores or updates, or whose rewards fail, does that
iteration again, bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from mmalign.advantages import Advantages
from mmalign.config import LoadedConfig
from mmalign.data.groups import GroupSample
from mmalign.losses.reduce import masked_mean
from mmalign.policies.rollouts import Trajectory
from mmalign.run.folder import RunResult
from mmalign.run.online import OnlineSession
from mmalign.run.panel import Rewards

from .offline import sync_only


def train(loaded: LoadedConfig) -> RunResult:
    """Train to `train.steps` (or an interruption), continuing what the run folder holds."""
    with OnlineSession(loaded) as session:
        if session.already_finished is not None:
            return session.already_finished
        config, accelerator = session.config.train, session.accelerator
        method = session.load_method()
        updates = method.updates_per_rollout
        panel = session.load_panel()
        policy = session.load_policy()
        groups = session.load_prompts(policy, method)
        state = session.restore(policy, groups)
        session.preflight_rollout(policy, method, groups, state)
        optimizer, scheduler, ema = session.optimizer, session.scheduler, session.ema
        parameters = [parameter for _, parameter in policy.trainable()]

        with session.training(state) as meter, panel:
            while state.step < config.steps and not session.should_stop:
                iteration = state.step // updates
                dealt, trajectories = groups.mine(iteration), []
                with session.phase("rollout"):
                    for samples in (samples for micros in dealt for samples in micros):
                        trajectories.append(method.rollout(policy, groups, samples, iteration))
                        panel.submit(samples, policy.decode(trajectories[-1].latents))  # scored while the next is drawn
                with session.phase("reward"), session.kept_when_rewards_fail(policy, state, meter):
                    rewards = panel.collect(groups.samples(iteration), accelerator)
                    session.check_rewards(rewards, groups.samples(iteration), iteration)
                advantages = method.advantages(rewards)
                for update, micros in enumerate(dealt):
                    mine = [trajectories.pop(0) for _ in micros]
                    used = float(advantages.weight_N[groups.share(iteration, update)].sum())
                    with session.phase("update"):
                        for loss, last in losses(policy, method, micros, mine, advantages, used, meter, accelerator):
                            # The forward belongs inside: DDP decides there whether its backward will synchronise.
                            with sync_only(last, accelerator, policy):
                                accelerator.backward(loss())
                        norm, skipped = torch.zeros((), device=policy.device), False
                        if used:  # else nothing was learned, and momentum alone should not move the weights
                            norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm or float("inf"))
                            optimizer.step()
                            skipped = optimizer.step_was_skipped  # fp16 only: the gradient scaler met an overflow
                        if not skipped:
                            scheduler.step()
                            if ema is not None:
                                ema.step(parameters)
                        optimizer.zero_grad(set_to_none=True)
                        state.step += 1
                        state.rows_seen += groups.rows_per_step
                    meter.add(rollout_metrics(rewards, advantages))
                    session.after_step(policy, state, meter, norm, skipped=skipped, between=update == updates - 1)
        return session.finish(policy, state)


def losses(
    policy: Any,
    method: Any,
    micros: Sequence[Sequence[GroupSample]],
    trajectories: Sequence[Trajectory],
    advantages: Advantages,
    used: float,
    meter: Any,
    accelerator: Accelerator,
) -> Iterator[tuple[Callable[[], Tensor], bool]]:
    """What to back-propagate for one update: functions that run one forward each, with whether it is the last.

    One recorded step of one micro-batch at a time: the batch shape of the rollout, so that a replay can equal it.
    `used` is the number of samples that count in this update over all processes, the denominator everywhere: dropped
    samples have weight 0 and nobody waits for anybody.
    """
    processes = accelerator.num_processes  # DDP averages gradients over them; the sum over the global set is wanted
    for number, (samples, trajectory) in enumerate(zip(micros, trajectories, strict=True)):
        index = [sample.index for sample in samples]
        advantage_B = advantages.value_N[index].to(policy.device)
        weight_B = advantages.weight_N[index].to(policy.device)
        replay = policy.replayer(trajectory)
        num_steps = trajectory.log_prob_BS.shape[1]
        for column in range(num_steps):

            def one(
                replay: Any = replay,
                old_B: Tensor = trajectory.log_prob_BS[:, column],
                advantage_B: Tensor = advantage_B,
                weight_B: Tensor = weight_B,
                column: int = column,
                denominator: float = used * num_steps,
            ) -> Tensor:
                reference = reference_mean(policy, replay, column) if method.needs_reference else None
                part = method.loss(replay(column), old_B, advantage_B, reference)
                values = {"loss": part.loss_B.detach(), **part.metrics} if denominator else {}
                meter.add({n: masked_mean(v, weight_B, denominator) * processes for n, v in values.items()})
                return masked_mean(part.loss_B, weight_B, denominator) * processes

            yield one, number == len(micros) - 1 and column == num_steps - 1


@torch.no_grad()
def reference_mean(policy: Any, replay: Any, column: int) -> Tensor:
    """The reference's mean of a recorded step."""
    with policy.view("reference"):
        return replay(column).mean


def rollout_metrics(rewards: Rewards, advantages: Advantages) -> dict[str, Tensor]:
    """Of the rollout behind an update: rewards (raw means), how much they tell apart, and how varied the samples are."""
    stats = advantages.stats
    values = {
        "reward": stats.reward,
        "reward_std": stats.reward_std,
        "group_std": stats.group_std,
        "zero_std_share": stats.zero_std_share,
        "invalid_share": stats.num_invalid / stats.num_samples,
        "diversity": rewards.diversity,
    }
    for index, (name, mean) in enumerate(zip(rewards.names, stats.reward_K, strict=True)):
        values[f"{'reward' if index < rewards.num_training else 'held_out'}/{name}"] = mean
    # A watched reward may have scored nothing, and no group may have two valid samples: nothing to say then.
    return {name: torch.tensor(v, dtype=torch.float64) for name, v in values.items() if not math.isnan(v)}
