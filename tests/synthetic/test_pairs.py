"""Preference pairs: the chosen side is true, the rejected side is wrong in exactly the named parts."""

from __future__ import annotations

import numpy as np
import pytest

from mmalign.synthetic import scenes
from mmalign.synthetic.pairs import preference_pairs
from mmalign.synthetic.scenes import captions
from mmalign.synthetic.scorer import score


@pytest.mark.parametrize("tier", scenes.TIERS)
def test_chosen_is_right_and_rejected_is_wrong_where_it_says(tier: scenes.Tier) -> None:
    pairs = preference_pairs("wrong_attribute", 150, seed=7, tier=tier)
    prompts = [p.prompt for p in pairs]
    chosen = score(np.stack([p.chosen_HWC for p in pairs]), prompts)
    rejected = score(np.stack([p.rejected_HWC for p in pairs]), prompts)
    assert chosen.all_right.mean() >= 0.99
    assert rejected.all_right.sum() == 0
    assert (chosen.graded > rejected.graded).mean() >= 0.99
    exact = 0
    for pair, found in zip(pairs, rejected.images, strict=True):
        wrong = {p.name for p in found.parts if not p.right}
        assert set(pair.wrong) & wrong
        exact += wrong == set(pair.wrong)
    if tier == "attributes":
        assert exact >= 149
        assert {len(p.wrong) for p in pairs} == {1, 2}


def test_a_pair_depends_on_seed_and_index_alone() -> None:
    few = preference_pairs("wrong_attribute", 3, seed=1, size_px=32)
    many = preference_pairs("wrong_attribute", 120, seed=1, size_px=32)
    other = preference_pairs("wrong_attribute", 3, seed=2, size_px=32)
    for a, b in zip(few, many, strict=False):
        assert (a.id, a.prompt, a.wrong) == (b.id, b.prompt, b.wrong)
        np.testing.assert_array_equal(a.chosen_HWC, b.chosen_HWC)
        np.testing.assert_array_equal(a.rejected_HWC, b.rejected_HWC)
    assert any((a.chosen_HWC != b.chosen_HWC).any() for a, b in zip(few, other, strict=True))
    assert len({p.id for p in many}) == 120


def test_position_is_kept_unless_the_size_changes() -> None:
    pairs = preference_pairs("wrong_attribute", 60, seed=3)
    for pair in pairs:
        if pair.wrong == ("colour",):
            changed = (pair.chosen_HWC != pair.rejected_HWC).any(axis=2)
            background = (pair.chosen_HWC == pair.chosen_HWC[0, 0]).all(axis=2)
            assert not (changed & background).any()


def test_prompts_come_from_the_split_and_cover_it() -> None:
    prompts = [p.prompt for p in preference_pairs("wrong_attribute", 64, seed=0, split="heldout", size_px=16)]
    assert sorted(prompts) == sorted(captions("attributes", "heldout"))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"'blurred'.*wrong_attribute"):
        preference_pairs("blurred", 1, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_pairs 0"):
        preference_pairs("wrong_attribute", 0, seed=0)
    with pytest.raises(ValueError, match="seed -1"):
        preference_pairs("wrong_attribute", 1, seed=-1)
    with pytest.raises(ValueError, match="split"):
        preference_pairs("wrong_attribute", 1, seed=0, split="test")  # type: ignore[arg-type]
