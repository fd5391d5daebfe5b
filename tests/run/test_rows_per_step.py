"""A run that is continued with other rows per step would not be the same run: the message says what to change."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mmalign
from mmalign.run.checkpoint import CheckpointError

from .online import online_config, write_rewards

METHOD = """
from mmalign.trainers.grpo import GroupPolicyGradient


class Mine(GroupPolicyGradient):
    def __init__(self, *, group_size: int = {group_size}):
        super().__init__(kernel="ddim", level=1.0, num_steps=3, group_size=group_size, prompts_per_rollout=2)
"""


def test_an_offline_run_is_told_of_train_accumulate(tiny: Callable):
    mmalign.train(tiny(train={"steps": 1, "batch_size": 2, "accumulate": 2}))
    with pytest.raises(
        CheckpointError, match=r"written with 4 rows per step, this start would use 2: .*train.accumulate"
    ):
        mmalign.train(tiny(train={"steps": 2, "batch_size": 2, "accumulate": 1}))


def test_an_online_run_is_told_of_its_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """There only another default can lead here, of a package that was updated: what the config and own files say is compared
    before, and processes do not matter."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # both versions are written within a second
    method = tmp_path / "installed_method.py"
    method.write_text(METHOD.format(group_size=4))
    config = online_config(tmp_path, [f"{write_rewards(tmp_path)}:red"], train={"steps": 1})
    config["method"] = {"name": "installed_method:Mine"}
    mmalign.train(config)
    method.write_text(METHOD.format(group_size=6))
    monkeypatch.delitem(sys.modules, "installed_method")
    longer = {**config, "train": {**config["train"], "steps": 2}}
    with pytest.raises(CheckpointError, match=r"8 rows per step, this start would use 12: .*defaults") as found:
        mmalign.train(longer)
    assert "train.accumulate" not in str(found.value)
    sys.modules.pop("installed_method")
