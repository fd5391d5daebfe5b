"""What an online run needs beside the session's part: prompts dealt out in groups, training rewards, the replay check."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mmalign.config import ConfigError, LoadedConfig, reward_identity
from mmalign.data.groups import Groups, GroupSample, check_even
from mmalign.reward import RewardError
from mmalign.run import atomic
from mmalign.run.checkpoint import CheckpointError, LoopState
from mmalign.run.panel import RewardPanel, Rewards
from mmalign.run.preflight import probe_rollout
from mmalign.run.session import Session
from mmalign.run.tracking import Meter


class OnlineSession(Session):
    """A session whose data are prompts and whose run can be left between iterations only."""

    unit = "samples"

    def __init__(self, loaded: LoadedConfig) -> None:
        super().__init__(loaded)
        self._failing: set[str] = set()
        self._listing = False

    def load_method(self) -> Any:
        method = super().load_method()
        self.stride = method.updates_per_rollout
        # Before anything is loaded: these are mistakes of the config.
        if self.config.train.steps % self.stride:
            raise ConfigError(
                f"train.steps = {self.config.train.steps}: must be a multiple of method.updates_per_rollout = {self.stride}"
            )
        check_even(
            group_size=method.group_size,
            prompts_per_rollout=method.prompts_per_rollout,
            updates_per_rollout=method.updates_per_rollout,
            batch_size=self.config.train.batch_size,
            world_size=self.accelerator.num_processes,
        )
        self._reference_idle = not method.needs_reference
        return method

    def load_prompts(self, policy: Any, method: Any) -> Groups:
        """Read the prompts of an online run, encode what is not cached yet, and deal out the samples."""
        config = self.config
        rows, features = self.rows(policy, method)
        return Groups.of(
            method,
            rows,
            features,
            config.train,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )

    def preflight_rollout(self, policy: Any, method: Any, groups: Groups, state: LoopState) -> None:
        """Replay of the first micro-batch and gradient reach, before the first step of a fresh run."""
        if state.step or not self.config.run.preflight or not self.config.train.steps:
            return
        with self.phase("preflight"):
            trajectory = method.rollout(policy, groups, groups.mine(0)[0][0], 0)
            lines = probe_rollout(policy, trajectory, dtype=self.config.model.dtype)
        for line in lines:
            self.say(f"preflight: {line}")

    def load_panel(self) -> RewardPanel:
        """The training rewards and, watched from the first rollout, those held out of training."""
        config, device = self.config, self.accelerator.device
        with self.phase("load"):
            trained_on = [reward_identity(reward) for reward in config.rewards]
            watched = [reward for reward in config.evaluate.held_out if reward_identity(reward) not in trained_on]
            scorers = self.evidence.load([*config.rewards, *watched], device)
        for scorer, reward in zip(scorers, config.rewards, strict=False):
            if reward.weight > 0 and not scorer.higher_is_better:
                raise ConfigError(
                    f"reward {scorer.name!r}: lower is better, but weight {reward.weight} would raise it. Give a "
                    f"negative weight"
                )
        training = [
            (scorer, reward.weight, reward.timeout) for scorer, reward in zip(scorers, config.rewards, strict=False)
        ]
        return RewardPanel(training, scorers[len(config.rewards) :], device=device)

    @contextmanager
    def kept_when_rewards_fail(self, policy: Any, state: LoopState, meter: Meter) -> Iterator[None]:
        """Write a checkpoint before a `RewardError` of the block ends the run: no weight has changed since the last update.

        Such an error is raised on all processes or on none, so that all of them come here.
        """
        try:
            yield
        except RewardError as error:
            if not state.step:  # nothing was trained yet
                raise
            text = str(error).rstrip(".")
            try:
                self.checkpoint(policy, state, meter)
            except CheckpointError as unwritten:
                raise CheckpointError(f"{text}. Then {unwritten}") from error
            raise RewardError(
                f"{text}. Nothing is lost: a checkpoint of step {state.step} is written. With this mended, start the "
                f"same command again",
                error.problem,
            ) from error

    def check_rewards(self, rewards: Rewards, samples: Sequence[GroupSample], iteration: int) -> None:
        """Keep a line of every missing score, and stop when a training reward has none at all."""
        if self.is_main:
            self._list_failures(rewards, samples, iteration)
        for column, name in enumerate(rewards.names):
            reasons = [reason for _, failed, reason in rewards.failures if failed == name]
            if reasons and name not in self._failing:
                self._failing.add(name)
                self.say(
                    f"reward {name!r}: {len(reasons)} of {len(samples)} samples of iteration {iteration} have no score "
                    f"({reasons[0]}); they are left out of the update and listed in reward_failures.jsonl"
                )
            if column < rewards.num_training and bool(rewards.reward_NK[:, column].isnan().all()):
                raise RewardError(
                    f"reward {name!r} gave no valid score for any of the {len(samples)} samples of iteration "
                    f"{iteration}: {reasons[0]}",
                    "invalid",
                )

    def _list_failures(self, rewards: Rewards, samples: Sequence[GroupSample], iteration: int) -> None:
        path = self.folder.path / "reward_failures.jsonl"
        if not self._listing and path.is_file():  # what a killed run listed of iterations that are done again
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["iteration"] < iteration:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError):
                    continue  # the half-written last line of a killed process
            atomic.write_text(path, "".join(f"{line}\n" for line in kept))
        self._listing = True
        if rewards.failures:
            found = (
                {"iteration": iteration, "prompt": samples[n].row.prompt, "sample": n, "reward": name, "reason": reason}
                for n, name, reason in rewards.failures
            )
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in found)
