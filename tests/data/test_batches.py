"""What a batch shows: the crop of each visit, and only the images that the method reads."""

from __future__ import annotations

import pytest
import torch

from mmalign.data.batches import Batches
from mmalign.data.cache import FeatureCache, build_cache
from mmalign.data.features import ImageFeatures
from mmalign.data.load import load_rows, verify_images


@pytest.mark.parametrize("num_draws", [1, 2, 3, 4])
@pytest.mark.parametrize("cache_reference", [0, 24])
def test_crops_cycle_through_the_visits_of_a_row(num_draws, cache_reference, linear_policy, make_rows, data_config):
    config = data_config(crop="random", num_crops=4, cache_reference=cache_reference)
    rows = make_rows(1, width=40, height=16)
    features = ImageFeatures(linear_policy(), config, None, seed=0)
    batches = Batches(rows, features, config, seed=0, batch_size=1, accumulate=1, num_draws=num_draws)
    crops = [features.image(rows[0].chosen, "row0", crop_id)["mean"] for crop_id in range(4)]
    for visit in range(6):
        (shown,) = batches.make([(0, visit)]).chosen
        assert [torch.equal(shown["mean"], crop) for crop in crops].index(True) == visit % 4


@pytest.mark.parametrize("sides", [("chosen", "rejected"), ("chosen",), ()])
def test_only_the_sides_that_the_method_reads_are_encoded(sides, linear_policy, make_rows, data_config, tmp_path):
    policy, rows, config = linear_policy(), make_rows(3), data_config()
    cache = FeatureCache(tmp_path / "cache")
    report = build_cache(policy, rows, config, cache, seed=0, sides=sides)
    assert report.num_images == len(policy.images) == 3 * len(sides)
    for store in (cache, None):
        policy.images.clear()
        features = ImageFeatures(policy, config, store, seed=0, sides=sides)
        batch = Batches(rows, features, config, seed=0, batch_size=3, accumulate=1).make([(0, 0), (1, 0), (2, 0)])
        assert (len(batch.chosen), len(batch.rejected)) == (3 * ("chosen" in sides), 3 * ("rejected" in sides))
        assert len(policy.images) == (0 if store else 3 * len(sides))


@pytest.mark.parametrize("cached", [True, False])
def test_a_broken_image_that_no_method_reads_costs_no_row(cached, linear_policy, data_config, encoded, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "prompt": "x", "chosen": "1.png", "rejected": "2.png"}')
    (tmp_path / "1.png").write_bytes(encoded(1))
    (tmp_path / "2.png").write_bytes(b"broken")
    config = data_config(tmp_path / "prompts.jsonl", on_bad_row="skip")
    row_set = load_rows(config, seed=0)
    if cached:
        cache = FeatureCache(tmp_path / "cache")
        assert not build_cache(linear_policy(), row_set.rows, config, cache, seed=0, sides=("chosen",)).bad
        assert build_cache(linear_policy(), row_set.rows, config, cache, seed=0).bad
        return
    features = ImageFeatures(linear_policy(), config, None, seed=0, sides=("chosen",))
    assert len(verify_images(row_set, features, config).rows) == 1
