"""Which steps are noisy and which are trained: functions of seed, iteration and sample, never of rank or position.

Shape legend: B samples, S steps.
"""

from __future__ import annotations

import math

import pytest
import torch

from mmalign.diffusion.kernels import random_subset, window


def test_window_is_a_function_of_seed_and_iteration_and_spares_the_last_step():
    starts = set()
    for iteration in range(200):
        chosen_S = window(3, iteration, 10, size=3, low=0, high=5)
        assert torch.equal(chosen_S, window(3, iteration, 10, size=3, low=0, high=5))
        where = chosen_S.nonzero().flatten().tolist()
        assert where == list(range(where[0], where[0] + 3))
        assert where[-1] < 5
        starts.add(where[0])
    assert starts == {0, 1, 2}
    reached = {int(window(0, i, 6, size=1).nonzero()) for i in range(200)}
    assert reached == {0, 1, 2, 3, 4}
    others = [window(4, i, 10, size=3, high=5).tolist() for i in range(50)]
    assert others != [window(3, i, 10, size=3, high=5).tolist() for i in range(50)]


def test_random_subset_belongs_to_the_sample_not_to_its_place():
    index_BS = random_subset(0, 4, ["a", "b", "c"], 16, fraction=0.6)
    assert index_BS.shape == (3, 9)
    assert index_BS.dtype == torch.int64
    for row in index_BS.tolist():
        assert len(set(row)) == 9
        assert set(row) <= set(range(15))
    turned = random_subset(0, 4, ["c", "a"], 16, fraction=0.6)
    assert torch.equal(turned, index_BS[[2, 0]])
    assert not torch.equal(random_subset(0, 5, ["a", "b", "c"], 16, fraction=0.6), index_BS)
    assert not torch.equal(random_subset(1, 4, ["a", "b", "c"], 16, fraction=0.6), index_BS)
    assert sorted(random_subset(0, 0, ["a"], 50, fraction=1.0)[0].tolist()) == list(range(49))
    # 0.29 · 100 is 28.999… in floating point; 29 steps are meant.
    assert random_subset(0, 0, ["a"], 101, fraction=0.29).shape == (1, 29)
    assert random_subset(0, 0, [], 16, fraction=0.6).shape == (0, 9)


def test_random_subset_reaches_every_step_equally():
    ids = [str(n) for n in range(3000)]
    count = torch.bincount(random_subset(0, 0, ids, 11, fraction=0.3).flatten(), minlength=10)
    assert (count.float() / 3000 - 0.3).abs().max() < 0.04  # 4.8 standard deviations of a share of .3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 3, "high": 10}, "low < high <= 9"),
        ({"size": 3, "low": 5, "high": 5}, "low < high"),
        ({"size": 6, "low": 0, "high": 5}, "window size 6: must be 1 to 5"),
        ({"size": 0}, "window size 0"),
        ({"size": 2, "low": -1}, "0 <= low"),
    ],
)
def test_window_refuses(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        window(0, 0, 10, **arguments)


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5, 0.05, math.nan])
def test_random_subset_refuses(fraction: float):
    with pytest.raises(ValueError, match=f"fraction.* {fraction}"):
        random_subset(0, 0, ["a"], 10, fraction=fraction)
