"""Contexts, targets and image negatives of text rows, with the bundled LLaVA: cached = uncached, once per image."""

from __future__ import annotations

import base64
import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.config import ModelConfig, NegativeConfig
from mmalign.data.cache import FeatureCache, build_cache
from mmalign.data.features import ImageFeatures, make_features
from mmalign.data.load import (
    RowSet,
    check_rows,
    content_fingerprint,
    drop_bad,
    fingerprint,
    image_problem,
    load_rows,
    verify_images,
)
from mmalign.data.negatives import crop_box
from mmalign.data.text_features import TextFeatures
from mmalign.policies.load import load_policy
from mmalign.randomness import generator
from mmalign.types import DataError, ImageRef, Row, Turn

DRAWS = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def policy():
    config = ModelConfig(family="llava", path="builtin:llava-tiny")
    return load_policy(config, data=None, device=torch.device("cpu"), seed=0)


@pytest.fixture
def counted(policy, monkeypatch) -> list[bytes]:
    """The pixels of every image that reaches the vision tower, in order."""
    seen: list[bytes] = []
    encode = policy.encode_images

    def encode_and_count(images):
        seen.extend(image.tobytes() for image in images)
        return encode(images)

    monkeypatch.setattr(policy, "encode_images", encode_and_count)
    return seen


@pytest.fixture
def cache(tmp_path) -> FeatureCache:
    return FeatureCache(tmp_path / "features")


@pytest.fixture(scope="module")
def answers(encoded):
    """answers(n): text pairs; row i shows image i."""

    def make(number: int) -> list[Row]:
        return [
            Row(
                id=f"row{i}",
                prompt="<image>\ndescribe the image .",
                chosen="there is a red circle .",
                rejected="there is a blue square .",
                images=(ImageRef(content=encoded(i, width=48, height=48), source=f"pairs:{i} image"),),
                source=f"pairs:{i}",
            )
            for i in range(number)
        ]

    return make


def features_of(policy, config, cache, rows=(), **more) -> TextFeatures:
    found = make_features(policy, config, cache, seed=0, rows=rows, **more)
    assert isinstance(found, TextFeatures)
    return found


def same_context(first, second) -> bool:
    pairs = zip(first.features, second.features, strict=True)
    return (
        torch.equal(first.ids, second.ids)
        and first.image_ids == second.image_ids
        and all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)
    )


# --- what a batch gets ------------------------------------------------------------------------------------------------


def test_modality_picks_the_class(policy, linear_policy, data_config):
    assert isinstance(make_features(linear_policy(), data_config(), None, seed=0), ImageFeatures)
    assert isinstance(make_features(policy, data_config(), None, seed=0), TextFeatures)


def test_context_and_target_are_the_tokens_of_the_policy(policy, answers, data_config):
    rows = answers(2)
    features = features_of(policy, data_config(), None)
    contexts = features.contexts(rows, [0, 0])
    for row, context in zip(rows, contexts, strict=True):
        ids_P, ids_T = policy.tokenize(row, "chosen")
        assert torch.equal(context.ids, ids_P)
        (target,) = features.targets([row], "chosen", [0])
        assert torch.equal(target.ids, ids_T)
        (other,) = features.targets([row], "rejected", [0])
        assert not torch.equal(target.ids, other.ids)
        (expected,) = policy.encode_images([row.images[0].open()])
        assert torch.allclose(context.features[0], expected["features"], atol=1e-5)  # encoded in another batch
    assert torch.equal(contexts[0].ids, contexts[1].ids)
    assert contexts[0].image_ids != contexts[1].image_ids, "equal tokens, other images: never one prefix"


@pytest.mark.parametrize("kind", ["crop", "other", "black", "noise"])
def test_cached_and_uncached_records_are_equal(kind, policy, answers, data_config, cache):
    rows = answers(4)
    config = data_config(image_negative=NegativeConfig(kind=kind, variants=2))
    report = build_cache(policy, rows, config, cache, seed=0, negatives=True)
    assert (report.num_images, report.num_prompts) == (4, 0)
    built = features_of(policy, config, FeatureCache(cache.folder), rows)
    direct = features_of(policy, config, None, rows)
    for ask in ("contexts", "negatives"):
        first, second = (getattr(found, ask)(rows, DRAWS) for found in (built, direct))
        assert all(same_context(a, b) for a, b in zip(first, second, strict=True))


def test_build_leaves_nothing_to_encode(policy, answers, data_config, cache, counted):
    rows = answers(3)
    again = [replace(row, id=f"{row.id} again") for row in rows]
    config = data_config(image_negative=NegativeConfig(variants=2))
    report = build_cache(policy, [*rows, *again], config, cache, seed=0, negatives=True, batch_size=4)
    # Each image once, and two crops for each of the six rows.
    assert (report.encoded, len(counted), len(set(counted))) == (3 + 12, 15, 15)
    fresh = features_of(policy, config, FeatureCache(cache.folder))
    for row in (*rows, *again):
        fresh.contexts([row], [0])
        for draw in range(4):
            fresh.negatives([row], [draw])
    assert len(counted) == 15
    second = build_cache(policy, [*rows, *again], config, FeatureCache(cache.folder), seed=0, negatives=True)
    assert (second.encoded, second.reused) == (0, 15)


def test_without_negatives_only_what_is_shown_is_built(policy, answers, data_config, cache, counted):
    build_cache(policy, answers(3), data_config(), cache, seed=0)
    assert len(counted) == 3


def test_images_of_a_batch_are_encoded_in_one_call_and_once(policy, answers, data_config, monkeypatch):
    rows = answers(2)
    both = replace(rows[0], id="both", prompt="<image><image> what ?", images=rows[0].images + rows[1].images)
    calls = []
    encode = policy.encode_images
    monkeypatch.setattr(policy, "encode_images", lambda images: calls.append(len(images)) or encode(images))
    contexts = features_of(policy, data_config(), None).contexts([*rows, both, rows[0]], DRAWS)
    assert calls == [2]
    assert contexts[2].image_ids == contexts[0].image_ids + contexts[1].image_ids
    assert torch.equal(contexts[2].features[1], contexts[1].features[0])
    assert same_context(contexts[0], contexts[3])


def test_rows_without_images_need_no_vision_tower(policy, answers, data_config, counted):
    row = replace(answers(1)[0], prompt="what ?", images=())
    (context,) = features_of(policy, data_config(), None).contexts([row], [0])
    assert (context.features, context.image_ids, counted) == ((), (), [])
    with pytest.raises(DataError, match="pairs:0: the row shows no image"):
        features_of(policy, data_config(), None).negatives([row], [0])


def test_image_models_have_no_negatives(linear_policy, make_rows, data_config):
    with pytest.raises(ValueError, match="this model draws images from a prompt, so there is no image to replace"):
        make_features(linear_policy(), data_config(), None, seed=0).negatives(make_rows(1), [0])


def test_draws_set_crop_flip_and_dropout_of_image_rows(linear_policy, make_rows, data_config):
    rows = make_rows(3, width=40, height=16)
    config = data_config(crop="random", num_crops=3, flip=True, prompt_dropout=0.5)
    features = ImageFeatures(linear_policy(), config, None, seed=0)
    contexts = [features.contexts(rows, [draw] * 3) for draw in range(40)]
    dropped = [not record["embedding"].any() for visit in contexts for record in visit]
    assert 0.3 < np.mean(dropped) < 0.7
    for draw in range(4):
        sides = [features.targets(rows, side, [draw] * 3) for side in ("chosen", "rejected")]
        for row, chosen, rejected in zip(rows, *sides, strict=True):
            assert torch.equal(chosen["size"], rejected["size"]), "both sides share the crop"
            flips = [
                torch.equal(chosen["mean"], features.image(row.chosen, row.id, draw % 3, flip)["mean"])
                for flip in (0, 1)
            ]
            assert flips.count(True) == 1


# --- negatives --------------------------------------------------------------------------------------------------------


def test_negative_keeps_the_prompt_and_changes_the_image(policy, answers, data_config, counted):
    (row,) = answers(1)
    features = features_of(policy, data_config(image_negative=NegativeConfig(variants=3)), None)
    (context,) = features.contexts([row], [0])
    negatives = [features.negatives([row], [draw])[0] for draw in range(6)]
    for negative in negatives:
        assert torch.equal(negative.ids, context.ids)
        assert negative.image_ids != context.image_ids
        assert not torch.allclose(negative.features[0], context.features[0], atol=1e-3)
    assert [same_context(a, b) for a, b in zip(negatives, negatives[3:], strict=False)] == [True] * 3, (
        "variant = draw % 3"
    )
    assert len({negative.image_ids for negative in negatives}) == 3
    # What the vision tower saw is mDPO's crop of this image, from this row's randomness.
    top, left, height, width = crop_box(48, 48, (0.01, 0.2), generator(0, "negative_crop", "row0"))
    part = row.images[0].open().crop((left, top, left + width, top + height))
    assert part.resize((48, 48), Image.Resampling.BICUBIC).tobytes() in counted


def test_default_negative_is_mdpos_crop(policy, answers, data_config):
    rows = answers(2)
    default = features_of(policy, data_config(), None).negatives(rows, [0, 0])
    crop = features_of(policy, data_config(image_negative=NegativeConfig()), None).negatives(rows, [0, 0])
    assert all(same_context(a, b) for a, b in zip(default, crop, strict=True))


def test_each_image_of_a_row_gets_its_own_negative(policy, answers, data_config):
    (row,) = answers(1)
    twice = replace(row, prompt="<image><image> what ?", images=row.images * 2)
    (negative,) = features_of(policy, data_config(), None).negatives([twice], [0])
    assert negative.image_ids[0] != negative.image_ids[1]


def test_images_that_came_with_the_row_are_its_negative(policy, answers, data_config, cache):
    rows = answers(2)
    rows[0] = replace(rows[0], rejected_images=rows[1].images)
    config = data_config(image_negative=NegativeConfig(kind="noise", variants=3))
    build_cache(policy, rows, config, cache, seed=0, negatives=True)
    features = features_of(policy, config, cache)
    shown = features.contexts(rows, [0, 0])
    for draw in range(3):
        first, second = features.negatives(rows, [draw] * 2)
        assert first.image_ids == shown[1].image_ids
        assert second.image_ids not in (shown[0].image_ids, shown[1].image_ids)


def test_other_is_another_rows_image_and_skips_broken_ones(policy, answers, data_config, encoded):
    rows = answers(6)
    rows[0] = replace(rows[0], images=(replace(rows[0].images[0], content=b"broken"),))
    rows[5] = replace(rows[5], images=(replace(rows[5].images[0], content=rows[4].images[0].content),))
    config = data_config(image_negative=NegativeConfig(kind="other", variants=8))
    features = features_of(policy, config, None, rows)
    shown = {row.id: features.contexts([row], [0])[0].image_ids for row in rows[1:]}
    picked = set()
    for row in rows[1:]:
        for draw in range(8):
            (negative,) = features.negatives([row], [draw])
            assert negative.image_ids != shown[row.id]
            assert negative.image_ids in shown.values()
            picked.add(negative.image_ids)
    assert len(picked) > 2


def test_other_needs_another_image(policy, answers, data_config, cache):
    rows = [answers(1)[0]]
    config = data_config(image_negative=NegativeConfig(kind="other"))
    with pytest.raises(DataError, match=r"pairs:0: no other row shows a different image.*kind: crop"):
        build_cache(policy, rows, config, cache, seed=0, negatives=True)


def test_shares_of_several_processes_make_one_cache(policy, answers, data_config, cache, counted):
    rows = answers(5)
    config = data_config(image_negative=NegativeConfig(kind="other"))
    for rank in range(2):
        build_cache(policy, rows, config, FeatureCache(cache.folder), seed=0, share=(rank, 2), negatives=True)
    assert len(counted) == 5
    whole = build_cache(policy, rows, config, FeatureCache(cache.folder), seed=0, negatives=True)
    assert whole.encoded == 0


# --- the blind control ------------------------------------------------------------------------------------------------


def test_blind_shows_black_everywhere(policy, answers, data_config, counted, cache):
    rows = answers(3)
    rows[0] = replace(rows[0], rejected_images=rows[1].images)
    config = data_config(blind=True)
    build_cache(policy, rows, config, cache, seed=0, negatives=True)
    features = features_of(policy, config, cache)
    contexts, negatives = features.contexts(rows, [0] * 3), features.negatives(rows, [0] * 3)
    assert set(counted) == {bytes(48 * 48 * 3)}
    for context in (*contexts, *negatives):
        assert torch.equal(context.features[0], contexts[0].features[0])
    seeing = features_of(policy, data_config(), None).contexts(rows, [0] * 3)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(contexts, seeing, strict=True))


# --- bad rows ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cutting(answers, data_config):
    """The policy with room for three response tokens, and the config that says so."""
    (row,) = answers(1)
    config = ModelConfig(family="llava", path="builtin:llava-tiny")
    whole = load_policy(config, device="cpu", train=False)
    data = data_config(max_length=len(whole.tokenize(row, "chosen")[0]) + 3, truncation="response")
    return load_policy(config, data=data, device="cpu", train=False), data


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_responses_that_are_cut_to_the_same_tokens_are_a_bad_row(cutting, answers, tmp_path, cached):
    """Both begin alike and differ only in what does not fit: nothing is left to prefer."""
    policy, config = cutting
    rows = answers(3)  # "there is a red …" against "there is a blue …": cut before they differ
    rows[1] = replace(rows[1], rejected="a blue square .")
    says = r"pairs:0: chosen and rejected are the same 3 tokens to the model: nothing to prefer; raise data.max_length"

    def usable(config):
        row_set = RowSet(rows, {"rows": 3, "bad": 0}, fingerprint(rows))
        bad_rows = tmp_path / "bad_rows.jsonl"
        if not cached:
            return check_rows(row_set, features_of(policy, config, None), config, bad_rows_path=bad_rows)
        report = build_cache(policy, rows, config, FeatureCache(tmp_path / "features"), seed=0)
        return drop_bad(row_set, report.bad, bad_rows_path=bad_rows)

    with pytest.raises(DataError, match=rf"^{says}.*on_bad_row: skip"):
        usable(config)
    left = usable(config.model_copy(update={"on_bad_row": "skip"}))
    assert [row.id for row in left.rows] == ["row1"]
    assert (left.counts["rows"], left.counts["bad"]) == (1, 2)
    listed = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text().splitlines()]
    assert [entry["source"] for entry in listed] == ["pairs:0", "pairs:2"]


def test_texts_that_tokenize_alike_are_a_bad_row(policy, answers, data_config):
    (row,) = answers(1)
    same = replace(row, rejected=row.chosen.replace(" ", "  "))
    assert features_of(policy, data_config(), None).problem(same) == (
        "chosen and rejected are the same 7 tokens to the model: nothing to prefer; remove the row"
    )


def bad_rows(answers, encoded) -> list[tuple[Row, str]]:
    (row,) = answers(1)
    picture = row.images[0]
    return [
        (replace(row, images=row.images * 2), r"1 <image> mark\(s\) for 2 image\(s\)"),
        (replace(row, prompt="what ?"), r"0 <image> mark\(s\) for 1 image\(s\)"),
        (replace(row, images=()), r"1 <image> mark\(s\) for 0 image\(s\)"),
        (replace(row, rejected_images=row.images * 2), "2 rejected_images for 1 images"),
        (replace(row, chosen=""), "chosen is empty"),
        (replace(row, rejected="  "), "rejected is empty"),
        (replace(row, rejected=row.chosen), "chosen and rejected are the same text"),
        (replace(row, chosen="a <image>"), "chosen holds <image>"),
        (replace(row, chosen=picture), "chosen is an image, but the model answers in text"),
        (replace(row, history=(Turn("tool", "x"),)), "role 'tool' is unknown"),
        (replace(row, chosen="red " * 3000), r"\d+ prompt and \d+ response tokens exceed the limit.*data.max_length"),
        (replace(row, history=(Turn("user", "red " * 3000), Turn("assistant", "x"))), r"the prompt has \d+ tokens"),
    ]


def test_bad_rows_are_named_before_anything_is_encoded(policy, answers, encoded, data_config, cache, counted):
    for number, (row, says) in enumerate(bad_rows(answers, encoded)):
        row = replace(row, source=f"pairs.jsonl:{number}")
        with pytest.raises(DataError, match=rf"^pairs.jsonl:{number}: (?!pairs).*{says}.*on_bad_row: skip"):
            build_cache(policy, [row], data_config(), cache, seed=0)
    assert counted == []


def test_skipped_rows_are_reported_and_the_rest_is_built(policy, answers, encoded, data_config, cache):
    rows = [replace(row, id=f"bad{n}") for n, (row, _) in enumerate(bad_rows(answers, encoded))]
    rows[3:3] = [replace(row, id=f"good{n}") for n, row in enumerate(answers(2))]
    report = build_cache(policy, rows, data_config(on_bad_row="skip"), cache, seed=0)
    assert [bad.row_id for bad in report.bad] == [f"bad{n}" for n in range(12)]
    assert report.num_images == 2


def test_rows_are_checked_without_a_cache_too(policy, answers, encoded, data_config, tmp_path, counted):
    texts = [base64.b64encode(encoded(seed)).decode() for seed in range(3)]
    line = {"prompt": "what ?", "chosen": "a red circle .", "rejected": "a blue square ."}
    lines = [{**line, "images": [text]} for text in texts]
    lines[1]["chosen"] = "red " * 3000
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    config = data_config(file, on_bad_row="skip", cache=False)
    row_set = load_rows(config, seed=0)
    kept = check_rows(row_set, features_of(policy, config, None), config, bad_rows_path=tmp_path / "bad.jsonl")
    assert [row.source for row in kept.rows] == [f"{file}:1", f"{file}:3"]
    assert "exceed the limit" in json.loads((tmp_path / "bad.jsonl").read_text())["reason"]
    strict = data_config(file, cache=False)
    with pytest.raises(DataError, match=rf"^{file}:2: .*exceed the limit"):
        check_rows(row_set, features_of(policy, strict, None), strict)
    assert counted == []


def test_method_that_contrasts_images_refuses_rows_without_one(policy, answers, data_config):
    row = replace(answers(1)[0], prompt="what ?", images=())
    assert features_of(policy, data_config(), None).problem(row) is None
    assert "no image to contrast" in features_of(policy, data_config(), None, negatives=True).problem(row)


def test_broken_image_of_a_prompt_is_named(policy, answers, data_config, cache):
    rows = answers(3)
    rows[1] = replace(rows[1], images=(ImageRef(content=b"junk", source="pairs:1 images[0]"),))
    with pytest.raises(DataError, match=r"pairs:1: pairs:1 images\[0\]: not an image"):
        build_cache(policy, rows, data_config(), cache, seed=0)
    assert "pairs:1 images[0]: not an image" in str(image_problem(features_of(policy, data_config(), None), rows[1]))
    report = build_cache(policy, rows, data_config(on_bad_row="skip"), cache, seed=0)
    assert [bad.row_id for bad in report.bad] == ["row1"]


def test_negative_images_that_are_the_images_are_refused(policy, answers, data_config, cache, tmp_path):
    rows = answers(2)
    rows[0] = replace(rows[0], rejected_images=rows[0].images)
    with pytest.raises(DataError, match="images and rejected_images are the same, byte for byte"):
        build_cache(policy, rows, data_config(), cache, seed=0)


def test_image_model_refuses_text_rows(linear_policy, answers, make_rows, data_config, cache):
    with pytest.raises(DataError, match=r"pairs:0: the response is text \('there is a red circle"):
        build_cache(linear_policy(), answers(1), data_config(), cache, seed=0)
    shown = replace(make_rows(1)[0], images=answers(1)[0].images)
    with pytest.raises(DataError, match="the prompt shows images or earlier turns"):
        build_cache(linear_policy(), [shown], data_config(), cache, seed=0)


# --- identity ---------------------------------------------------------------------------------------------------------


def test_fingerprint_sees_every_part_of_a_text_row(answers, encoded):
    rows = answers(2)
    changes = [
        {"chosen": "x"},
        {"rejected": "x"},
        {"prompt": "<image> x"},
        {"images": rows[1].images},
        {"rejected_images": rows[1].images},
        {"history": (Turn("user", "x"),)},
        {"history": (Turn("assistant", "x"),)},
        {"chosen": rows[0].images[0]},
    ]
    prints = {fingerprint([replace(rows[0], **change)]) for change in ({}, *changes)}
    assert len(prints) == 9
    assert fingerprint([rows[0].swapped()]) not in prints


def test_content_fingerprint_reads_the_images_of_prompts(tmp_path, answers, encoded, cache):
    path = tmp_path / "0.png"
    found = []
    for seed in (0, 1):
        path.write_bytes(encoded(seed))
        row = replace(answers(1)[0], images=(ImageRef(path=path),))
        found.append((fingerprint([row]), content_fingerprint("x", [row], cache.digests)))
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


def test_verify_images_reads_those_of_prompts(policy, data_config, tmp_path, encoded):
    for seed in range(2):
        (tmp_path / f"{seed}.png").write_bytes(encoded(seed))
    (tmp_path / "2.png").write_bytes(b"junk")
    lines = [{"images": [f"{n}.png"], "prompt": "what ?", "chosen": "x", "rejected": "y"} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = data_config(tmp_path / "a.jsonl", on_bad_row="skip")
    kept = verify_images(load_rows(config, seed=0), features_of(policy, config, None), config)
    assert [Path(row.source).name for row in kept.rows] == ["a.jsonl:1", "a.jsonl:2"]


def test_several_threads_share_tokenizer_and_cache(policy, answers, data_config, cache):
    rows = answers(6)
    features = features_of(policy, data_config(), cache)
    expected = features_of(policy, data_config(), None).contexts(rows, [0] * 6)
    wrong = []

    def work() -> None:
        found = features.contexts(rows, [0] * 6)
        wrong.extend(not same_context(a, b) for a, b in zip(found, expected, strict=True))
        features.targets(rows, "chosen", [0] * 6)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [False] * 24
