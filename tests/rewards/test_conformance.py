"""`rewards check` finds what it is there to find: every planted fault fails its own line, and a sound reward passes."""

from __future__ import annotations

import json

import pytest

from mmalign.config import RewardConfig
from mmalign.conformance import check_reward, run_checks
from mmalign.reward_catalog import class_name, list_rewards, new_reward, reward_cards


def failed(path: str, name: str = "f", **options) -> set[str]:
    return {check.name for check in run_checks(f"{path}:{name}", **options) if check.status == "fail"}


FAULTS = {
    "loads": "def g(images): return []",
    "call": "def f(images): raise RuntimeError('boom')",
    "shape": "def f(images): return np.zeros((len(images), 1))",
    "dtype": "def f(images): return ['1'] * len(images)",
    "NaN policy": "def f(images): return [None] * len(images)",
    "batch of 1": """
        def f(images):
            means = np.array([np.asarray(i).mean() for i in images])
            return means - means.mean()
    """,
    "order": "def f(images): return list(range(len(images)))",
    "determinism": """
        calls = []
        def f(images):
            calls.append(1)
            return [float(len(calls))] * len(images)
    """,
    "declared range": """
        def f(images): return [2.0] * len(images)
        f.range = (0, 1)
    """,
    "prompts": """
        def f(images, prompts): return [float(len(p)) for p in prompts]
        f.needs_prompt = False
    """,
    "columns": "def f(images, **columns): return [float(len(columns))] * len(images)",
    "hard inputs": """
        def f(images):
            for image in images:
                assert image.width == image.height
            return [0.5] * len(images)
    """,
    "images": """
        def f(images):
            for image in images:
                image.putpixel((0, 0), (1, 2, 3))
            return [0.5] * len(images)
    """,
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_fails_its_line(reward_file, name: str):
    path = reward_file(FAULTS[name])
    assert name in failed(path)
    assert check_reward(f"{path}:f") == 1


def test_failing_batch_of_two_alone_is_found(reward_file):
    path = reward_file("def f(images): return [0.0 if len(images) == 2 else 1.0] * len(images)")
    assert "batch of 2" in failed(path)


def test_template_passes_its_own_check(tmp_path, capsys):
    path = new_reward("my_reward", tmp_path)
    assert check_reward(f"{path}:MyReward") == 0
    assert {check.status for check in run_checks(f"{path}:MyReward")} == {"pass"}
    assert "the reward keeps the contract" in capsys.readouterr().out
    options = RewardConfig(name=f"{path}:MyReward", target=2.0)
    assert check_reward(options) == 1  # scores leave the declared range


@pytest.mark.parametrize("name", ["aesthetic", "clip", "synthetic_truth"])
def test_bundled_rewards_keep_the_contract(name: str):
    assert {check.name: check.detail for check in run_checks(name) if check.status != "pass"} == {}


def test_reward_with_undeclared_range_and_prompt_gets_notes_not_failures(reward_file):
    path = reward_file("def f(images, prompts): return [float(len(p)) for p in prompts]")
    notes = {check.name: check.detail for check in run_checks(f"{path}:f") if check.status == "note"}
    assert set(notes) == {"declared range", "prompts"}
    assert "needs_prompt = True" in notes["prompts"]
    assert failed(path) == set()


def test_stand_in_scores_are_noted(reward_file):
    path = reward_file("def f(images): return [0.0] * len(images)")
    notes = {check.name: check.detail for check in run_checks(f"{path}:f") if check.status == "note"}
    assert "all 7 images got 0" in notes["NaN policy"]


def test_reward_that_needs_a_column_is_checked_on_data(reward_file, world, tmp_path):
    path = reward_file("def f(images, answer): return [float(a) for a in answer]")
    checks = run_checks(f"{path}:f")
    assert (checks[-1].name, checks[-1].status) == ("columns", "fail")
    assert "'answer'; give rows that have it with --data FILE" in checks[-1].detail
    lines = []
    for n, image in enumerate(world.images[:3]):
        image.save(tmp_path / f"{n}.png")
        lines.append(json.dumps({"image": f"{n}.png", "prompt": "x", "answer": n}))
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(lines))
    assert failed(path, data=str(data)) == set()


def test_table_shows_brackets_as_they_are(reward_file, capsys):
    path = reward_file("def f(images): return np.zeros((len(images), 1))")
    check_reward(f"{path}:f")
    assert "[7, 1]" in "".join(capsys.readouterr().out.split("\n"))


# --- list and new -----------------------------------------------------------------------------------------------------


def test_list_shows_every_registered_reward_with_options():
    from rich.console import Console

    from mmalign.registry import names

    cards = reward_cards()
    assert [card.name for card in cards] == names("reward")
    assert all(card.summary for card in cards)
    assert {card.name: card.needs_prompt for card in cards}["clip"] is True
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    list_rewards(console)
    text = console.export_text()
    assert "builtin:clip-tiny" in text
    assert all(card.name in text for card in cards)


def test_new_reward_names(tmp_path, capsys):
    assert class_name("my_reward") == "MyReward"
    path = new_reward("sharp", tmp_path / "deep")
    assert path == tmp_path / "deep" / "sharp.py"
    assert f"mmalign rewards check {path}:Sharp" in capsys.readouterr().out
    assert "mmalign rewards check sharp.py:Sharp" in path.read_text()
    with pytest.raises(ValueError, match="exists already"):
        new_reward("sharp", tmp_path / "deep")
    for name in ("My-Reward", "1st", "", "class", "../x"):
        with pytest.raises(ValueError, match="expected small letters"):
            new_reward(name, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        new_reward("x", tmp_path / "file")
