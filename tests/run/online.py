"""Rewards as a user would write them, and a tiny online config; shared by the online tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

REWARDS = '''
import os
import time
from pathlib import Path
import numpy as np

HERE = Path(__file__).parent


def red(images, prompts):
    """Mean redness, and a note of each call."""
    with (HERE / "calls.txt").open("a") as file:
        file.write("x")
    return [float(np.asarray(image, np.float32)[..., 0].mean() / 255) for image in images]


def coarse_red(images, prompts):
    """Two digits: no rounding of one pixel can move it, so that only the training itself is compared."""
    return [round(value, 2) for value in red(images, prompts)]


def slow_red(images, prompts):
    values = red(images, prompts)
    time.sleep(0.4)
    return values


def moody(images, prompts):
    """NaN for every image darker than most: on some ranks and not on others."""
    values = [float(np.asarray(image, np.float32).mean() / 255) for image in images]
    return [None if value < 0.25 else round(value, 2) for value in values]


def never(images, prompts):
    return [None] * len(images)


def raises(images, prompts):
    raise ConnectionError("the judge is down")


def raises_sometimes(images, prompts):
    """Every second call."""
    with (HERE / "tries.txt").open("a") as file:
        file.write("x")
    if (HERE / "tries.txt").stat().st_size % 2:
        raise ConnectionError("the judge is down")
    return [float(np.asarray(image, np.float32)[..., 1].mean() / 255) for image in images]


def fragile(images, prompts):
    """Fine in the first iteration (4 calls); then broken as broken.txt says, on rank 1 of several, while there is one."""
    values, broken = red(images, prompts), HERE / "broken.txt"
    first = (HERE / "calls.txt").stat().st_size <= 4
    if first or os.environ.get("RANK", "1") != "1" or not broken.is_file():
        return values
    if broken.read_text() == "raises":
        raise ConnectionError("the judge is down")
    return values[:1]


def hangs(images, prompts):
    time.sleep(60)


def short(images, prompts):
    return [1.0]
'''


def write_rewards(folder: Path) -> Path:
    path = folder / "rewards_for_tests.py"
    path.write_text(REWARDS)
    return path


def online_config(folder: Path, rewards: list[Any], **sections: Any) -> dict[str, Any]:
    """8 samples in two groups of four, two updates per rollout."""
    config: dict[str, Any] = {
        "model": {"family": "sdxl", "path": "builtin:sdxl-tiny"},
        "method": {
            "name": "grpo",
            "kernel": "ddim",
            "level": 1.0,
            "num_steps": 4,
            "group_size": 4,
            "prompts_per_rollout": 2,
            "updates_per_rollout": 2,
            "clip_range": 1e-3,
        },
        "data": {"path": "builtin:attributes_train", "format": "prompts", "cache_dir": str(folder / "cache")},
        "rewards": rewards,
        "train": {"steps": 6, "batch_size": 2, "learning_rate": 1e-4},
        "run": {"log_every": 1, "tracker": "none"},
        "output_dir": str(folder / "run"),
    }
    for name, value in sections.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) and name in config else value
    return config


FLOW = {
    "model": {"family": "sd3", "path": "builtin:sd3-tiny", "max_sequence_length": 8},
    "method": {"kernel": "flow_sde", "level": 0.7},
}
