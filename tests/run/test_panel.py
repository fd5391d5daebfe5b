"""The reward panel: it scores while the caller goes on, and one hung batch costs that batch alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import mmalign
from mmalign.data.groups import GroupSample
from mmalign.reward import Scorer, load_reward
from mmalign.run.panel import RewardPanel
from mmalign.types import DrawKey, Row

from .online import online_config

REWARDS = """
import sys
import threading
import time

called, going, scored = [], threading.Event(), threading.Event()


def waits(images, prompts):
    called.append(len(images))
    assert going.wait(60)
    scored.set()
    return [float(index) for index, _ in enumerate(images)]


def second_call_hangs(images, prompts):
    called.append(len(images))
    if len(called) == 2:
        going.wait(60)
    return [float(len(called))] * len(images)


def sees_sampling(images, prompts):
    called.append(len(images))
    deadline = time.monotonic() + (60 if len(called) == 1 else 0)  # the last batch has no next one
    while time.monotonic() < deadline and not scored.is_set():
        frame = sys._current_frames()[threading.main_thread().ident]
        while frame is not None:
            if frame.f_code.co_name == "rollout":
                scored.set()
            frame = frame.f_back
    return [float(index) for index, _ in enumerate(images)]
"""


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    path = tmp_path / "panel_rewards.py"
    path.write_text(REWARDS)
    return path


def samples_of(batch: int) -> list[GroupSample]:
    keys = [DrawKey(0, "row", 2 * batch + n) for n in (0, 1)]
    return [GroupSample(key.draw, 0, Row("row", "a prompt"), key, key) for key in keys]


def submit(panel: RewardPanel, batches: Sequence[int]) -> list[GroupSample]:
    for batch in batches:
        panel.submit(samples_of(batch), [Image.new("RGB", (16, 16))] * 2)
    return [sample for batch in batches for sample in samples_of(batch)]


def module_of(scorer: Scorer) -> dict:
    return scorer.reward.__globals__


def test_a_batch_is_scored_while_the_next_is_drawn(rewards: Path):
    """The reward has taken the first batch, and answers it, before the second is there."""
    scorer = load_reward(f"{rewards}:waits")
    module = module_of(scorer)
    with RewardPanel([(scorer, 1.0, None)]) as panel:
        first = submit(panel, [0])  # returns although the reward waits
        assert not module["scored"].is_set()
        module["going"].set()
        assert module["scored"].wait(60), "nothing is scored before `collect`"
        found = panel.collect([*first, *submit(panel, [1])], Accelerator(cpu=True))
    assert found.reward_NK[:, 0].tolist() == [0, 1, 0, 1]
    assert module["called"] == [2, 2]


def test_the_loop_draws_the_next_batch_while_the_first_is_scored(rewards: Path, tmp_path: Path):
    """Seen from the reward's first call: the main thread is in `rollout`."""
    scorer = load_reward(f"{rewards}:sees_sampling")
    mmalign.train(online_config(tmp_path, [f"{rewards}:sees_sampling"], train={"steps": 2}))
    assert module_of(scorer)["called"] == [2, 2, 2, 2]
    assert module_of(scorer)["scored"].is_set()


def test_a_hung_batch_costs_its_own_scores_alone(rewards: Path):
    """The worker is replaced: what waited behind the hung call is scored, only the hung samples are NaN."""
    scorer = load_reward(f"{rewards}:second_call_hangs")
    with RewardPanel([(scorer, 1.0, 5.0)]) as panel:
        found = panel.collect(submit(panel, range(4)), Accelerator(cpu=True))
        again = panel.collect(submit(panel, range(2)), Accelerator(cpu=True))
    module_of(scorer)["going"].set()  # the thread that was left behind may end
    assert torch.isnan(found.reward_NK[:, 0]).tolist() == [False, False, True, True, False, False, False, False]
    assert [(index, reason) for index, _, reason in found.failures] == [
        (index, "no answer within 5 s") for index in (2, 3)
    ]
    assert not again.failures, "the new worker serves the next rollout too"
