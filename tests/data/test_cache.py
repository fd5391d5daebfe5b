"""The feature cache: every unique thing once, keys, damage, concurrency; and the records a batch gets."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from mmalign.data.cache import FeatureCache, build_cache, cache_folder, feature_key
from mmalign.data.digests import DigestIndex
from mmalign.data.features import ImageFeatures
from mmalign.types import DataError, ImageRef


@pytest.fixture
def cache(tmp_path) -> FeatureCache:
    return FeatureCache(tmp_path / "features")


def files(cache: FeatureCache) -> list[Path]:
    return sorted(cache.folder.rglob("*.safetensors"))


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- store ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_record_comes_back_exactly_from_disk(dtype, cache):
    record = {"a": torch.arange(6).reshape(2, 3).to(dtype), "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    size = cache.put("ab" * 16, record)
    fresh = FeatureCache(cache.folder)
    assert same(fresh.get("ab" * 16), record)
    assert fresh.get("ab" * 16)["a"].dtype == dtype
    assert size == fresh.size("ab" * 16) == cache.path("ab" * 16).stat().st_size
    assert cache.path("ab" * 16).parent.name == "ab"


def test_absent_entry_is_none(cache):
    assert cache.get("0" * 32) is None
    assert cache.size("0" * 32) is None


def test_key_depends_on_every_part():
    keys = {
        feature_key("image", "vae", "d", 16, 0.5, 0.5, False),
        feature_key("prompt", "vae", "d", 16, 0.5, 0.5, False),
    }
    for changed in (
        ("x", "d", 16, 0.5, 0.5, False),
        ("vae", "d", 16, 0.5, 0.5, True),
        ("vae", "d", 32, 0.5, 0.5, False),
    ):
        keys.add(feature_key("image", *changed))
    assert len(keys) == 5


def test_memory_holds_the_most_recent_within_its_budget(cache):
    small = FeatureCache(cache.folder, memory_bytes=100)
    for name in ("a", "b", "c"):
        small.put(name * 32, {"x": torch.full((10,), ord(name), dtype=torch.float32)})  # 40 bytes each
    for path in files(small):
        path.unlink()
    assert small.get("a" * 32) is None
    assert small.get("b" * 32)["x"][0] == ord("b")
    small.put("d" * 32, {"x": torch.zeros(10)})
    assert small.get("c" * 32) is None, "b was used more recently"
    assert small.get("b" * 32) is not None


@pytest.mark.parametrize("damage", ["truncated", "one flipped bit", "empty", "another entry", "no safetensors"])
def test_damaged_entry_is_reported_and_replaced(damage, cache):
    record, key = {"x": torch.arange(100.0)}, "ab" * 16
    cache.put(key, record)
    path = cache.path(key)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[:-50]
    elif damage == "one flipped bit":
        content[-30] ^= 1
    elif damage == "another entry":
        cache.put("cd" * 16, {"x": torch.zeros(100)})
        content = bytearray(cache.path("cd" * 16).read_bytes())
    else:
        content = bytearray(b"" if damage == "empty" else b"\x08\0\0\0\0\0\0\0nonsense")
    path.write_bytes(content)
    fresh = FeatureCache(cache.folder)
    with pytest.warns(RuntimeWarning, match=rf"cache entry {path} is damaged; it is encoded again"):
        assert fresh.get(key) is None
    if damage in ("truncated", "empty", "no safetensors"):
        assert fresh.size(key) is None
    fresh.put(key, record)
    assert same(FeatureCache(cache.folder).get(key), record)


def test_reader_never_sees_half_an_entry(cache):
    key, records = "ab" * 16, [{"x": torch.full((300_000,), float(n))} for n in range(2)]
    cache.put(key, records[0])
    stop = threading.Event()

    def rewrite() -> None:
        writer = FeatureCache(cache.folder, memory_bytes=0)
        while not stop.is_set():
            for record in records:
                writer.put(key, record)

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        reader = FeatureCache(cache.folder, memory_bytes=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = [reader.get(key)["x"] for _ in range(100)]
    finally:
        stop.set()
        thread.join()
    assert all(torch.equal(x, x[:1].expand(300_000)) for x in found)


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    cache = FeatureCache(tmp_path / "file")
    with pytest.raises(DataError, match=r"cannot write the cache below .*data.cache_dir, or data.cache: false"):
        cache.put("a" * 32, {"x": torch.zeros(1)})


def test_folder_comes_from_config_then_environment_then_home(data_config, tmp_path, monkeypatch):
    assert cache_folder(data_config(cache_dir=str(tmp_path))) == tmp_path / "features"
    monkeypatch.setenv("MMALIGN_CACHE", str(tmp_path / "env"))
    assert cache_folder(data_config()) == tmp_path / "env" / "features"
    monkeypatch.delenv("MMALIGN_CACHE")
    assert cache_folder(data_config()) == Path.home() / ".cache" / "mmalign" / "features"


# --- digests ----------------------------------------------------------------------------------------------------------


class CountingRef(ImageRef):
    reads = 0

    def read_bytes(self) -> bytes:
        CountingRef.reads += 1
        return super().read_bytes()


def test_files_are_hashed_once_until_they_change(tmp_path, monkeypatch):
    monkeypatch.setattr(CountingRef, "reads", 0)
    (tmp_path / "a.png").write_bytes(b"first")
    index = DigestIndex(tmp_path / "digests")
    ref = CountingRef(path=tmp_path / "a.png")
    digests = {index.digest(ref), index.digest(ref)}
    index.flush()
    later = DigestIndex(tmp_path / "digests")
    digests.add(later.digest(ref))
    assert CountingRef.reads == 1
    assert digests == {ImageRef(content=b"first").digest()}
    (tmp_path / "a.png").write_bytes(b"another")
    assert later.digest(ref) == ImageRef(content=b"another").digest()


def test_cells_of_tables_are_hashed_once(tmp_path, encoded, monkeypatch):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    from mmalign.data.readers import read_hub, read_parquet
    from mmalign.data.tables import DatasetImageRef, ParquetImageRef

    columns = {"prompt": ["a", "b"], "chosen": [encoded(0), encoded(1)], "rejected": [encoded(2), encoded(3)]}
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "saved"))
    for rows in (list(read_parquet(str(tmp_path / "p.parquet"))), list(read_hub(str(tmp_path / "saved")))):
        refs = [ref for row in rows for ref in (row.chosen, row.rejected)]
        index = DigestIndex(tmp_path / "digests")
        expected = [ImageRef(content=encoded(seed)).digest() for seed in (0, 2, 1, 3)]
        assert [index.digest(ref) for ref in refs] == expected
        index.flush()
        with monkeypatch.context() as patch:
            for kind in (DatasetImageRef, ParquetImageRef):
                patch.setattr(kind, "read_bytes", lambda self: pytest.fail("read again"))
            later = DigestIndex(tmp_path / "digests")
            assert [later.digest(ref) for ref in refs] == expected


def test_damaged_index_is_rebuilt(tmp_path):
    (tmp_path / "a.png").write_bytes(b"first")
    index = DigestIndex(tmp_path / "digests")
    index.digest(ImageRef(path=tmp_path / "a.png"))
    index.flush()
    (file,) = (tmp_path / "digests").iterdir()
    file.write_text("{")
    ref = ImageRef(path=tmp_path / "a.png")
    assert DigestIndex(tmp_path / "digests").digest(ref) == ref.digest()


# --- build ------------------------------------------------------------------------------------------------------------


def test_each_image_and_prompt_is_encoded_once(cache, make_rows, linear_policy, data_config):
    rows = make_rows(5)
    repeated = [*rows, *[row.__class__(**{**row.__dict__, "id": f"{row.id} again"}) for row in rows]]
    policy = linear_policy()
    calls = []
    report = build_cache(
        policy, repeated, data_config(), cache, seed=0, batch_size=3, progress=lambda *done: calls.append(done)
    )
    assert len(policy.images) == len(set(policy.images)) == 10
    assert sorted(policy.texts) == ["", *[f"caption {i}" for i in range(5)]]
    assert (report.num_images, report.num_prompts, report.encoded, report.reused) == (10, 6, 16, 0)
    assert report.bytes == sum(path.stat().st_size for path in files(cache))
    assert calls[-1] == (16, 16)
    again = build_cache(policy, repeated, data_config(), FeatureCache(cache.folder), seed=0)
    assert (again.encoded, again.reused, again.bytes) == (0, 16, report.bytes)
    assert len(policy.images) == 10
    assert "10 images and 6 prompts: 0 encoded, 16 reused" in str(again)


def test_both_flips_and_all_crops_are_built(cache, make_rows, linear_policy, data_config):
    policy, rows = linear_policy(), make_rows(2, width=40, height=16)
    config = data_config(flip=True, crop="random", num_crops=3)
    report = build_cache(policy, rows, config, cache, seed=0)
    assert (report.num_images, len(policy.images), report.encoded) == (4, 24, 24 + 3)
    features = ImageFeatures(policy, config, cache, seed=0)
    for row in rows:
        for crop_id, flip in features.variants():
            features.image(row.chosen, row.id, crop_id, flip)
    assert len(policy.images) == 24, "the build left nothing to encode"
    plain, mirrored = (features.image(rows[0].chosen, rows[0].id, 0, flip)["size"] for flip in (False, True))
    assert torch.equal(plain, mirrored), "same crop fractions for both flips"


@pytest.mark.parametrize(("free", "warned"), [(10_000, ["prompts", "images"]), (10_000_000, [])])
def test_a_disk_too_small_is_said_after_the_first_chunk(
    free, warned, cache, make_rows, linear_policy, data_config, monkeypatch
):
    disk = shutil.disk_usage(cache.folder.parent)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_cache(linear_policy(), make_rows(60), data_config(), cache, seed=0)
    said = [str(warning.message) for warning in caught if "free; set data.cache_dir" in str(warning.message)]
    assert [next(kind for kind in ("prompts", "images") if kind in text) for text in said] == warned


@pytest.mark.parametrize("change", ["encoder", "resolution", "size of the model"])
def test_another_encoder_or_resolution_encodes_anew(change, cache, make_rows, linear_policy, data_config):
    rows = make_rows(2)
    build_cache(linear_policy(), rows, data_config(), cache, seed=0)
    policy = {
        "encoder": linear_policy(version="2"),
        "resolution": linear_policy(),
        "size of the model": linear_policy(resolution=12),
    }[change]
    config = data_config(resolution=8) if change == "resolution" else data_config()
    report = build_cache(policy, rows, config, cache, seed=0)
    assert len(policy.images) == 4
    assert report.encoded == (4 + 3 if change == "encoder" else 4)


def test_damaged_entries_are_encoded_again(cache, make_rows, linear_policy, data_config):
    rows, policy = make_rows(3), linear_policy()
    build_cache(policy, rows, data_config(), cache, seed=0)
    key = ImageFeatures(policy, data_config(), cache, seed=0).image_key(rows[1].rejected, rows[1].id, 0, False)
    cache.path(key).write_bytes(cache.path(key).read_bytes()[:-7])
    report = build_cache(policy, rows, data_config(), FeatureCache(cache.folder), seed=0)
    assert (report.encoded, report.reused) == (1, 9)
    assert policy.images[-1] == policy.images[3]


def test_flipped_bit_is_encoded_again_when_met(cache, make_rows, linear_policy, data_config):
    rows, policy = make_rows(1), linear_policy()
    build_cache(policy, rows, data_config(), cache, seed=0)
    expected = ImageFeatures(policy, data_config(), cache, seed=0).image(rows[0].chosen, "row0")
    for path in files(cache):
        content = bytearray(path.read_bytes())
        content[-1] ^= 64
        path.write_bytes(content)
    features = ImageFeatures(policy, data_config(), FeatureCache(cache.folder), seed=0)
    with pytest.warns(RuntimeWarning, match="is damaged"):
        assert same(features.image(rows[0].chosen, "row0"), expected)


def test_bad_images_stop_or_are_reported(cache, make_rows, linear_policy, data_config, encoded):
    rows = make_rows(4)
    broken = ImageRef(content=encoded(3, "JPEG", width=64, height=64)[:300], source="pairs:1 rejected")
    rows[1] = rows[1].__class__(**{**rows[1].__dict__, "rejected": broken})
    rows[2] = rows[2].__class__(**{**rows[2].__dict__, "rejected": rows[2].chosen})
    with pytest.raises(DataError, match=r"pairs:1: pairs:1 rejected: .*truncated.*on_bad_row: skip"):
        build_cache(linear_policy(), rows, data_config(), cache, seed=0)
    policy = linear_policy()
    report = build_cache(policy, rows, data_config(on_bad_row="skip"), FeatureCache(cache.folder / "b"), seed=0)
    assert [(bad.source, bad.row_id) for bad in report.bad] == [("pairs:1", "row1"), ("pairs:2", "row2")]
    assert "same image, byte for byte" in report.bad[1].reason
    assert len(policy.images) == 4
    assert "2 bad rows" in str(report)


def test_files_are_found_bad_on_a_second_build_too(tmp_path, cache, make_rows, linear_policy, data_config, encoded):
    """The digests are known by then, so the identical pair is found without reading it again."""
    rows = make_rows(2)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded(50))
    pair = {"chosen": ImageRef(path=tmp_path / "a.png"), "rejected": ImageRef(path=tmp_path / "b.png")}
    rows[0] = rows[0].__class__(**{**rows[0].__dict__, **pair})
    config = data_config(on_bad_row="skip")
    for _ in range(2):
        report = build_cache(linear_policy(), rows, config, FeatureCache(cache.folder), seed=0)
        assert [bad.row_id for bad in report.bad] == ["row0"]


def test_encoder_that_overflows_is_an_error_not_an_entry(cache, make_rows, linear_policy, data_config):
    policy = linear_policy()
    encode = policy.encode_images

    def overflow(images):
        return [{**record, "mean": record["mean"] * float("inf")} for record in encode(images)]

    policy.encode_images = overflow
    with pytest.raises(ValueError, match=r"pairs:0 chosen: the encoder gave NaN or infinity in 'mean'.*fp16"):
        build_cache(policy, make_rows(1), data_config(), cache, seed=0)
    assert len(files(cache)) == 2, "the prompts only"


def test_two_processes_build_the_same_cache_at_once(tmp_path, cache, linear_policy, data_config, encoded):
    number = 40
    lines = []
    for seed in range(2 * number):
        (tmp_path / f"{seed}.png").write_bytes(encoded(seed))
    for i in range(number):
        lines.append(json.dumps({"prompt": f"caption {i}", "chosen": f"{2 * i}.png", "rejected": f"{2 * i + 1}.png"}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    script = """
import sys, time, pathlib
folder, here, me = map(pathlib.Path, sys.argv[1:4])
sys.path.insert(0, str(here))
from linear_policy import LinearPolicy
from mmalign.config import DataConfig
from mmalign.data.cache import FeatureCache, build_cache
from mmalign.data.load import load_rows
config = DataConfig(path=str(folder / "pairs.jsonl"), flip=True)
rows = load_rows(config, seed=0).rows
(folder / me).touch()
while not ((folder / "ready0").exists() and (folder / "ready1").exists()):
    time.sleep(0.001)
report = build_cache(LinearPolicy(), rows, config, FeatureCache(folder / "features"), seed=0)
print(report.encoded, report.reused)
"""
    arguments = [str(tmp_path), str(Path(__file__).parent)]
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", script, *arguments]
    running = [subprocess.Popen([*command, f"ready{i}"], stdout=subprocess.PIPE, text=True) for i in range(2)]
    counts = [tuple(map(int, process.communicate(timeout=120)[0].split())) for process in running]
    assert [process.returncode for process in running] == [0, 0]
    total = 2 * 2 * number + number + 1
    assert [encoded + reused for encoded, reused in counts] == [total, total]
    assert sum(encoded for encoded, _ in counts) >= total
    assert len(files(cache)) == total
    assert list(cache.folder.rglob(".*")) == [], "no temporary file is left"
    policy, config = linear_policy(), data_config(tmp_path / "pairs.jsonl", flip=True)
    image = ImageFeatures(policy, config, cache, seed=0).image(ImageRef(path=tmp_path / "7.png"), "any", 0, True)
    assert policy.images == []
    assert same(
        image, ImageFeatures(policy, config, None, seed=0).image(ImageRef(path=tmp_path / "7.png"), "any", 0, True)
    )


def test_several_threads_write_and_read_one_cache(cache, make_rows, linear_policy, data_config):
    rows, policy = make_rows(12), linear_policy()
    features = ImageFeatures(policy, data_config(), cache, seed=0)
    expected = [ImageFeatures(policy, data_config(), None, seed=0).image(row.chosen, row.id) for row in rows]
    wrong = []

    def work() -> None:
        found = [features.image(row.chosen, row.id) for row in rows]
        wrong.extend(not same(a, b) for a, b in zip(found, expected, strict=True))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [False] * 48


# --- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["center", "random"])
def test_cached_and_uncached_records_are_equal(crop, cache, make_rows, linear_policy, data_config):
    rows, policy = make_rows(3, width=40, height=20), linear_policy()
    config = data_config(crop=crop, num_crops=2, flip=True)
    build_cache(policy, rows, config, cache, seed=3)
    cached, direct = (ImageFeatures(policy, config, store, seed=3) for store in (FeatureCache(cache.folder), None))
    refs, ids = [row.rejected for row in rows], [row.id for row in rows]
    arguments = (refs, ids, [0, 1, 0], [True, False, False])
    if crop == "center":
        arguments = (refs, ids, [0, 0, 0], [True, False, False])
    assert all(same(a, b) for a, b in zip(cached.images(*arguments), direct.images(*arguments), strict=True))
    texts = ["", "caption 1", "", "new"]
    assert all(same(a, b) for a, b in zip(cached.prompts(texts), direct.prompts(texts), strict=True))


def test_misses_of_a_batch_are_encoded_in_one_call_and_once(cache, make_rows, linear_policy, data_config):
    rows, policy = make_rows(2), linear_policy()
    calls = []
    encode = policy.encode_images
    policy.encode_images = lambda images: calls.append(len(images)) or encode(images)
    features = ImageFeatures(policy, data_config(), cache, seed=0)
    refs = [rows[0].chosen, rows[1].chosen, rows[0].chosen]
    records = features.images(refs, ["a", "b", "c"], [0] * 3, [False] * 3)
    assert calls == [2]
    assert same(records[0], records[2])
    assert not same(records[0], records[1])
    features.images(refs, ["a", "b", "c"], [0] * 3, [False] * 3)
    assert calls == [2]


def test_without_a_cache_nothing_is_kept(make_rows, linear_policy, data_config):
    policy, row = linear_policy(), make_rows(1)[0]
    features = ImageFeatures(policy, data_config(), None, seed=0)
    assert same(features.image(row.chosen, row.id), features.image(row.chosen, row.id))
    assert same(features.prompt("a"), features.prompt("a"))
    assert (len(policy.images), policy.texts) == (2, ["a", "a"])


def test_both_images_of_a_row_share_crop_and_flip(make_rows, linear_policy, data_config):
    """Two copies of one scene, differing in one corner pixel, stay aligned under any crop and flip."""
    rows = make_rows(1, width=64, height=16)
    config = data_config(crop="random", num_crops=4, flip=True)
    features = ImageFeatures(linear_policy(), config, None, seed=1)
    crops = set()
    for crop_id, flip in features.variants():
        chosen, rejected = (features.prepare(ref, "row0", crop_id, flip) for ref in (rows[0].chosen, rows[0].rejected))
        assert chosen.crop_top_left == rejected.crop_top_left
        copy = features.prepare(rows[0].chosen, "row0", crop_id, flip)
        assert np.array_equal(copy.pixels, chosen.pixels)
        crops.add(chosen.crop_top_left)
    assert len(crops) == 4
    assert features.crop("row0", 0) != features.crop("row1", 0)
    assert features.crop("row0", 0) != ImageFeatures(linear_policy(), config, None, seed=2).crop("row0", 0)


def test_unreadable_image_is_named(make_rows, linear_policy, data_config, cache):
    features = ImageFeatures(linear_policy(), data_config(), cache, seed=0)
    with pytest.raises(DataError, match="pairs:9 chosen: not an image"):
        features.image(ImageRef(content=b"nonsense", source="pairs:9 chosen"), "row9")


def test_records_do_not_hold_on_to_the_whole_batch(make_rows, linear_policy, data_config):
    rows = make_rows(4)
    features = ImageFeatures(linear_policy(), data_config(), None, seed=0)
    records = features.images([row.chosen for row in rows], [row.id for row in rows], [0] * 4, [False] * 4)
    for record in records:
        assert record["mean"].untyped_storage().nbytes() == record["mean"].numel() * 4
