"""The evaluation that ends a run: tried out before anything is spent on training, held with rewards that are loaded once.

A reward that an online run trains with, or watches, stays loaded for the evaluation. Other rewards of the evaluation are
loaded twice on the run's device: before the model, to find mistakes, and again at the end. Between the two they take no
memory.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmalign import registry
from mmalign.config import Config, RewardConfig, reward_identity
from mmalign.evaluation import check_evaluation, evaluate_policy
from mmalign.policies.base import View
from mmalign.reward import Scorer, load_rewards

FILES = ("grid.png", "report.html", "report.json", "scores.jsonl", "answers.jsonl", "summary.json")


class EvidenceError(ValueError):
    """The evaluation of a finished training failed; the trained weights are written."""


class Evidence:
    """Before and after of one run."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._specs = [*config.evaluate.rewards, *config.evaluate.held_out]
        self._loaded: dict[str, Scorer] = {}

    def load(self, specs: Sequence[RewardConfig], device: Any) -> list[Scorer]:
        """One scorer per training reward, on `device`; kept for the evaluation. Raises `ValueError` naming the reward
        that cannot be loaded."""
        # Those of the report are named first: of two called `clip`, the one that is not reported becomes `clip-2`.
        reported = set(map(reward_identity, self._specs))
        ordered = sorted(specs, key=lambda spec: reward_identity(spec) not in reported)
        self._loaded = dict(zip(map(reward_identity, ordered), load_rewards(ordered, device), strict=True))
        return [self._loaded[reward_identity(spec)] for spec in specs]

    def check(self, device: Any) -> None:
        """Find mistakes before they cost a training; one process is enough. Rewards are loaded on `device` and freed again.

        Raises `ValueError` for a bad prompt list, and for a reward that cannot be loaded or is for the other modality.
        """
        if self.config.evaluate.prompts is not None:
            modality = registry.resolve("family", self.config.model.family).modality
            check_evaluation(modality, self.config.evaluate, load_rewards(self._specs, device, loaded=self._loaded))
            gc.collect()  # a model that refers to itself waits for it
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def withdraw(self, folder: Path) -> None:
        """Remove what an earlier end of a run that is now longer left in `folder`: it speaks of other weights.

        Samples stay; a note beside them says which weights made them.
        """
        for name in FILES:
            (folder / name).unlink(missing_ok=True)

    def hold(self, policy: Any, folder: Path, *, view: View, step: int, progress: Any) -> None:
        """Sample base and trained weights, score, and write the report to `folder`.

        Raises `ValueError` if `evaluate.prompts` is unset or unusable, or a reward cannot be loaded or scores no sample.
        """
        config = self.config
        reported = set(map(reward_identity, self._specs))
        # Training rewards that are not reported make room first.
        loaded = {identity: scorer for identity, scorer in self._loaded.items() if identity in reported}
        self._loaded.clear()
        scorers = load_rewards(self._specs, policy.device, loaded=loaded)
        trained_on = {reward_identity(reward) for reward in config.rewards}
        evaluate_policy(
            policy,
            config.evaluate,
            [(scorer, reward_identity(spec) in trained_on) for scorer, spec in zip(scorers, self._specs, strict=True)],
            folder,
            before="reference",
            after=view,
            labels=("base", "tuned"),
            title=f"{config.model.path}: {config.method.preset or config.method.name}",
            details={"run": folder.name, "step": str(step), "weights": view},
            progress=progress,
        )
