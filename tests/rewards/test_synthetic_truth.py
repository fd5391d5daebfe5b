"""The exact judge as a reward."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from mmalign.config import RewardConfig
from mmalign.reward import load_reward
from mmalign.synthetic.scorer import score

PARTS = {"background", "colour", "shape", "size", "count"}


def test_renders_are_all_right_and_sub_scores_are_the_judges(world):
    output = load_reward("synthetic_truth").score(*world)
    judged = score(world.images, world.prompts)
    assert set(output.sub_scores) == {"graded", "fraction", "all_right"} | PARTS
    for name in ("graded", "fraction", "all_right"):
        expected = torch.tensor(getattr(judged, name), dtype=torch.float32)
        torch.testing.assert_close(output.sub_scores[name], expected)
    torch.testing.assert_close(output.scores, torch.tensor(judged.total, dtype=torch.float32))
    assert output.sub_scores["all_right"].tolist() == [1.0] * 7


def test_parts_that_a_caption_does_not_have_are_nan(world):
    sub_scores = load_reward("synthetic_truth").score(*world).sub_scores
    assert torch.isnan(sub_scores["size"]).tolist() == [False] * 5 + [True] * 2
    assert torch.isnan(sub_scores["count"]).tolist() == [True] * 5 + [False] * 2


def test_one_wrong_word_costs_one_part(world):
    caption = world.prompts[0]
    colour = caption.split()[2]
    wrong = caption.replace(colour, "blue" if colour != "blue" else "red")
    right, worse = (load_reward("synthetic_truth").score(world.images[:1], [text]) for text in (caption, wrong))
    assert worse.sub_scores["colour"].item() == 0.0
    assert right.sub_scores["colour"].item() == 1.0
    assert worse.sub_scores["fraction"].item() == 0.75
    assert worse.sub_scores["all_right"].item() == 0.0
    assert worse.scores.item() < right.scores.item()


def test_image_or_prompt_that_cannot_be_judged_costs_no_other_its_score(world):
    images = [world.images[0], Image.new("RGB", (64, 32)), world.images[1]]
    output = load_reward("synthetic_truth").score(images, [world.prompts[0], world.prompts[0], "a photo of a dog"])
    assert torch.isnan(output.scores).tolist() == [False, True, True]
    assert output.errors[0] is None
    assert "H = W" in output.errors[1]
    assert "'photo'" in output.errors[2]


@pytest.mark.parametrize("name", ["total", "graded", "fraction", "all_right"])
def test_the_summary_that_is_the_score_is_an_option(world, name: str):
    scorer = load_reward(RewardConfig(name="synthetic_truth", score=name))
    expected = torch.tensor(getattr(score(world.images, world.prompts), name), dtype=torch.float32)
    torch.testing.assert_close(scorer.score(*world).scores, expected)
    with pytest.raises(ValueError, match=r"option 'score'.*'total'"):
        load_reward(RewardConfig(name="synthetic_truth", score=name + "x"))


def test_fingerprint_differs_between_summaries():
    prints = {load_reward(RewardConfig(name="synthetic_truth", score=s)).fingerprint for s in ("total", "graded")}
    assert len(prints) == 2
