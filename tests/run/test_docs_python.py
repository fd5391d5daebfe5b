"""The code in docs/python.md runs and does what its comments say."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
SHORT = '"train.steps=2", "data.options.num_pairs=32", "evaluate.limit=2", "evaluate.seeds=1", "evaluate.num_steps=2"'


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_demo_in_five_lines(capsys: pytest.CaptureFixture[str]):
    code = BLOCKS[0]
    assert len([line for line in code.splitlines() if line]) <= 5
    names = run(code.replace('["output_dir', f'[{SHORT}, "output_dir'))
    assert names["result"].summary["status"] == "finished"
    assert (names["result"].folder / "grid.png").is_file()
    assert names["result"].report["headline"] in capsys.readouterr().out


def test_policy_by_itself():
    assert run(BLOCKS[1])["samples"][0].image.size == (64, 64)
    assert Path("circle.png").is_file()


def test_language_model_by_itself(capsys: pytest.CaptureFixture[str]):
    run(BLOCKS[2])
    answers = [line for line in capsys.readouterr().out.splitlines() if line.startswith("there ")]
    assert len(answers) == 2


def test_loss_in_a_plain_torch_loop():
    names = run(BLOCKS[3])
    assert names["policy"][0] > 0.5
    assert abs(names["policy"][1]) < 1e-6
    first = names["dpo"](torch.zeros(1), torch.zeros(1), beta=1.0)
    assert first.item() == pytest.approx(math.log(2))
