"""Training moves the exact ground truth on prompts it never saw, in the direction the preferences say.

`make test` runs one seed of each method class on one policy; `make test-learning` the three-seed matrix of all of them,
which writes results.json.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmalign.evaluation.statistics import seed_matrix, wins

MATRIX = runpy.run_path(str(Path(__file__).with_name("matrix.py")), run_name="matrix")
RECIPES, RESULTS, ANSWERS = MATRIX["RECIPES"], MATRIX["RESULTS"], MATRIX["answers"]
NO_GUIDANCE, DEFAULT_GUIDANCE = 1.0, 3.0


def graded(name: str, steps: int, folder: Path) -> Any:
    """One seed of a recipe without guidance, most of them shortened: the matrix runs them as shipped."""
    extra = (f"evaluate.guidance_scale={NO_GUIDANCE}", f"train.steps={steps}")
    run = MATRIX["train"](RECIPES[name], seed=0, split="heldout", folder=folder, extra=extra)
    both = MATRIX["scores"](run)["graded", NO_GUIDANCE]
    return seed_matrix(wins(both["base"], both["tuned"])[None])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("flow_dpo_full", 100), ("flow_mapo_full", 150)])
def test_one_seed_improves_on_held_out_prompts(name: str, steps: int, tmp_path: Path):
    result = graded(name, steps, tmp_path / "run")
    assert result.interval[0] > 0.5, result


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("flow_dpo_full_swapped", 50), ("flow_mapo_full_swapped", 20)])
def test_swapped_pairs_make_the_model_worse(name: str, steps: int, tmp_path: Path):
    """The sign test: only a loss that really reads the preference can pass both this and the test above."""
    result = graded(name, steps, tmp_path / "run")
    assert result.interval[1] < 0.5, result


@pytest.mark.slow
def test_rewards_move_the_right_way_online(tmp_path: Path):
    """One seed of policy gradient on prompts it never sampled from, and the same with the reward's sign flipped.

    Flow-SDE on SD3 stands for the class; DDIM on SDXL and Dance-SDE are in the matrix, where three seeds tell (56 % to 68 %).
    """
    result = graded("flow_grpo_full", 80, tmp_path / "run")
    assert result.interval[0] > 0.5, result
    flipped = graded("flow_grpo_full_flipped", 40, tmp_path / "flipped")
    assert flipped.interval[1] < 0.5, flipped


@pytest.mark.slow
def test_language_models_hallucinate_less_and_look_at_the_image(tmp_path: Path):
    """One seed of DPO and mDPO on LLaVA, half as long as shipped, and DPO trained blind, which must change nothing."""
    extra = ("train.steps=150", "evaluate.limit=200", "evaluate.seeds=2")
    runs = {
        name: MATRIX["train"](RECIPES[name], seed=0, split="heldout", folder=tmp_path / name, extra=extra)
        for name in ("llava_dpo", "llava_mdpo", "llava_dpo_blind")
    }
    tables = {name: ANSWERS.summarise([run]) for name, run in runs.items()}
    dpo, mdpo = (ANSWERS.image_accuracy([runs[name]], "heldout") for name in ("llava_dpo", "llava_mdpo"))
    assert mdpo["image_accuracy_crops"]["share"] > dpo["image_accuracy_crops"]["share"], (mdpo, dpo)
    for name in ("llava_dpo", "llava_mdpo"):
        check_answers(name, "hallucinates less", tables[name])
    check_answers("llava_dpo_blind", "as the base", tables["llava_dpo_blind"])


@pytest.mark.learning
@pytest.mark.timeout(0)  # three trainings per recipe take hours
def test_three_seed_matrix_on_held_out_prompts():
    """Trains every recipe on three seeds, writes results.json, then holds each claim."""
    assert MATRIX["main"](["--split", "heldout", "--seeds", "0", "1", "2", "--save"]) == 0
    check_claims(json.loads(RESULTS.read_text()))


def test_committed_results_keep_their_claims():
    """What is committed is what the README says; `make test-learning` renews it."""
    results = json.loads(RESULTS.read_text())
    for name, table in results.items():
        assert table["split"] == "heldout", name
        assert len(table["seeds"]) >= 3, name
        assert table["command"], name
        assert table["commit"], name
    check_claims(results)


def check_claims(results: dict[str, Any]) -> None:
    assert results.keys() >= {*RECIPES, *MATRIX["DIFFERENCES"]}
    for name, recipe in RECIPES.items():
        if recipe.answers:
            check_answers(name, recipe.claim, results[name])
            continue
        rows = {g: results[name][f"graded@g{g:g}"] for g in (NO_GUIDANCE, DEFAULT_GUIDANCE)}
        assert rows[NO_GUIDANCE]["win_rate"] >= recipe.least_win, (name, rows)
        assert rows[DEFAULT_GUIDANCE]["interval"][0] >= recipe.least_bound, (name, rows)
        claim = recipe.claim.removesuffix(" at both")
        for row in rows.values() if claim != recipe.claim else [rows[NO_GUIDANCE]]:
            (low, high), seeds = row["interval"], row["per_seed"]
            if claim == "better":
                assert low > 0.5, (name, row)
                assert min(seeds) > 0.5, (name, row)
            elif claim == "worse":
                assert high < 0.5, (name, row)
                assert max(seeds) < 0.5, (name, row)
            elif claim == "at 50":
                assert low <= 0.5 <= high, (name, row)
            elif claim == "not better":
                # Labels without information cannot help; the noise they train in may cost a little.
                assert low <= 0.5, (name, row)
            else:
                assert claim == "control", (name, claim)
    # mDPO's own effect: what its reward says of a caption hangs on the image more than what DPO's says.
    dpo, mdpo = (results[name]["image_accuracy"]["interval"] for name in ("llava_dpo", "llava_mdpo"))
    assert mdpo[0] > dpo[1], (mdpo, dpo)


def check_answers(name: str, claim: str, table: dict[str, Any]) -> None:
    fall, recall, length = table["hallucination"], table["recall"], table["mentioned"]
    if claim == "hallucinates less":
        assert fall["interval"][0] > 0.2, (name, fall)
        # Saying less would lower hallucination for free.
        assert recall["difference"] > -0.04, (name, recall)
        assert abs(length["tuned"] / length["base"] - 1) < 0.07, (name, length)
    elif claim == "as the base":
        assert abs(fall["relative_fall"]) < 0.05, (name, fall)


def test_scores_of_a_run_are_read_as_matrices(tmp_path: Path):
    lines = [
        {"prompt": p, "seed": s, "label": label, "guidance_scale": 1.0, "scores": scores(i)}
        for i, label in enumerate(("base", "tuned"))
        for p in ("b", "a")
        for s in (0, 1)
    ]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = MATRIX["scores"](tmp_path)["graded", 1.0]
    assert found["base"].shape == (2, 2)
    assert np.array_equal(wins(found["base"], found["tuned"]), np.ones((2, 2)))


def scores(value: float) -> dict[str, float]:
    return {f"synthetic_truth.{name}": value for name in MATRIX["MEASURES"]}
