"""The evaluation is tried out before a run trains: where it will run, and without taking its room."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mmalign.config import load_config
from mmalign.reward import RewardError
from mmalign.run.evidence import Evidence

JUDGE = """
import weakref
from pathlib import Path

MADE = []


class Judge:
    def __init__(self, *, weights, device="cpu"):
        if not device.startswith("cuda"):
            raise RuntimeError(f"4-bit weights need a GPU, got {device}")
        Path(weights).read_bytes()
        self.layers = [self]  # as modules that know their parent
        MADE.append(weakref.ref(self))

    def __call__(self, images):
        return [0.0] * len(images)
"""


def test_a_reward_that_needs_a_gpu_is_tried_there_and_freed(tiny: Callable, tmp_path: Path):
    file, weights = tmp_path / "judge.py", tmp_path / "weights"
    file.write_text(JUDGE)
    reward = {"name": f"{file}:Judge", "weights": str(weights)}
    evaluate = {"prompts": "builtin:attributes_dev", "rewards": [reward]}
    evidence = Evidence(load_config(tiny(evaluate=evaluate)).config)
    with pytest.raises(RewardError, match="No such file or directory"):
        evidence.check("cuda")
    weights.write_bytes(b"")
    evidence.check("cuda")
    from mmalign import registry

    made = registry.resolve("reward", reward["name"]).__init__.__globals__["MADE"]
    assert [judge() for judge in made] == [None]
    with pytest.raises(RewardError, match="4-bit weights need a GPU, got cpu"):
        evidence.check("cpu")
