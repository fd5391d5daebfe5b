"""The same failures as a user meets them: exit code 2, one line on stderr, no traceback, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture
def mistakes(tiny: Callable, with_image: Callable, encoded: Callable, tmp_path: Path) -> Callable[[str], list[str]]:
    """Arguments of `mmalign train` with this mistake in them."""

    def make(kind: str) -> list[str]:
        config: dict[str, Any] = tiny()
        extra: list[str] = []
        if kind == "misspelt key":
            config["train"]["learning_rat"] = 1e-4
        elif kind == "wrong type":
            extra = ["train.steps=soon"]
        elif kind == "missing config":
            return [str(tmp_path / "gone.yaml")]
        elif kind == "syntax error in a reward":
            (tmp_path / "reward.py").write_text("def score(images)\n    return 1\n")
            config["evaluate"] = {"rewards": [f"{tmp_path / 'reward.py'}:score"]}
        elif kind == "missing data":
            config["data"] = {"path": str(tmp_path / "gone.jsonl")}
        elif kind == "truncated image":
            config["data"] = {"path": str(with_image(encoded(9, "JPEG", size=64)[:600], "cut.jpg"))}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        return [str(tmp_path / "config.yaml"), *extra]

    return make


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("misspelt key", "unknown key 'train.learning_rat' (did you mean 'learning_rate'?)"),
        ("wrong type", "train.steps = 'soon': Input should be a valid integer"),
        ("missing config", "gone.yaml' does not exist"),
        ("syntax error in a reward", "reward.py', line 1 cannot be loaded: SyntaxError: expected ':'"),
        ("missing data", "gone.jsonl' does not exist"),
        ("truncated image", "pairs.jsonl:4 chosen: the image is truncated or damaged (600 bytes"),
    ],
)
def test_mistake_is_one_line_and_leaves_nothing(
    mistakes: Callable, mmalign_cli: Callable, tmp_path: Path, kind: str, says: str
):
    done = mmalign_cli("train", *mistakes(kind))
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not (tmp_path / "run").exists()


def test_messages_of_several_lines_become_one(command: Callable, tmp_path: Path):
    (tmp_path / "reward.py").write_text("raise RuntimeError('first\\n    second')\n")
    (tmp_path / "image.png").write_bytes(b"")
    code, _, err = command("score", tmp_path / "image.png", "--reward", f"{tmp_path / 'reward.py'}:score")
    assert code == 2
    assert err.splitlines() == [err[:-1]]
    assert err.endswith("RuntimeError: first second\n")
