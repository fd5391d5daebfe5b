"""Broken images, rows and files, through training: one line that names the place, or a list of what was left out."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import mmalign
from mmalign.types import DataError

SKIP_HINT = "(data.on_bad_row: skip leaves bad rows out and lists them)"


# --- images -----------------------------------------------------------------------------------------------------------


def test_truncated_jpeg_is_named(on_pairs: Callable, with_image: Callable, encoded: Callable, refused: Callable):
    file = with_image(encoded(9, "JPEG", size=64)[:600], "cut.jpg")
    refused(on_pairs(file), DataError, f"{file}:4 chosen", "truncated or damaged (600 bytes", SKIP_HINT)


def test_image_of_one_pixel_is_named(on_pairs: Callable, with_image: Callable, encoded: Callable, refused: Callable):
    file = with_image(encoded(9, size=1), "dot.png")
    refused(on_pairs(file), DataError, f"{file}:4 chosen", "1x1 px is too small; each side needs at least 8 px")


def test_decompression_bomb_is_refused(on_pairs: Callable, with_image: Callable, bomb: bytes, refused: Callable):
    assert len(bomb) < 200
    file = with_image(bomb, "bomb.png")
    refused(on_pairs(file), DataError, f"{file}:4 chosen", "more pixels than the limit of 178,956,970", "downscale")


@pytest.mark.parametrize("content", [b"", b"<html>404 Not Found</html>"], ids=["empty", "web page"])
def test_file_that_is_no_image(on_pairs: Callable, with_image: Callable, refused: Callable, content: bytes):
    file = with_image(content, "odd.png")
    refused(on_pairs(file), DataError, f"{file}:4 chosen", "empty (0 bytes)" if not content else "not an image PIL")


def test_without_a_cache_a_broken_image_stops_the_run_too(
    on_pairs: Callable, with_image: Callable, encoded: Callable, tmp_path: Path
):
    file = with_image(encoded(9, "JPEG", size=64)[:600], "cut.jpg")
    config = on_pairs(file, data={"cache": False}, train={"steps": 8})
    with pytest.raises(DataError, match=r"pairs\.jsonl:4 chosen: the image is truncated"):
        mmalign.train(config)
    assert not (tmp_path / "run" / "final").exists()
    skipped = mmalign.train({**config, "data": {**config["data"], "on_bad_row": "skip"}, "output_dir": f"{file}-run"})
    assert skipped.summary["status"] == "finished"


def test_rgba_greyscale_cmyk_and_palette_images_train(on_pairs: Callable, pairs: Callable, encoded: Callable):
    kinds = {
        "rgba.png": ("PNG", "RGBA"),
        "grey.jpg": ("JPEG", "L"),
        "cmyk.jpg": ("JPEG", "CMYK"),
        "p.png": ("PNG", "P"),
    }
    lines = [{"prompt": name, "chosen": f"images/{name}", "rejected": "images/0.png"} for name in kinds]
    file = pairs(*lines, good=0)
    for seed, (name, (format, mode)) in enumerate(kinds.items()):
        (file.parent / "images" / name).write_bytes(encoded(10 + seed, format, mode))
    result = mmalign.train(on_pairs(file, train={"batch_size": 4}))
    assert result.summary["rows_seen"] == 8
    losses = [json.loads(line)["loss"] for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < loss < 10 for loss in losses)


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"prompt": "caf\xe9", "chosen": "images/0.png", "rejected": "images/1.png"}', "not UTF-8: byte 0xe9"),
        (b'{"prompt": "fox", "chosen"', "not valid JSON"),
        ({"prompt": "", "chosen": "images/0.png", "rejected": "images/1.png"}, "'prompt' is empty"),
        ({"prompt": "fox", "chosen": "images/0.png", "rejected": "images/9.png"}, "'images/9.png' does not exist"),
        ({"prompt": "fox", "chosen": "images/0.png", "rejected": "images/0.png"}, "are the same image"),
        ({"prompt": "fox", "chosen": "images/0.png"}, "no column 'rejected'"),
    ],
)
def test_bad_row_is_named_with_its_line(
    on_pairs: Callable, pairs: Callable, refused: Callable, line: dict | bytes, says: str
):
    file = pairs(line)
    refused(on_pairs(file), DataError, f"{file}:4", says, SKIP_HINT)


def test_two_files_with_the_same_bytes_are_identical(
    on_pairs: Callable, with_image: Callable, encoded: Callable, refused: Callable
):
    file = with_image(encoded(0), "copy_of_0.png")
    refused(on_pairs(file), DataError, f"{file}:4", "chosen and rejected are the same image, byte for byte")


def test_nothing_but_ties(on_pairs: Callable, pairs: Callable, refused: Callable):
    tie = {"prompt": "fox", "chosen": "images/0.png", "rejected": "images/1.png", "preference": 0.5}
    file = pairs(tie, {**tie, "prompt": "hare"}, good=0)
    refused(on_pairs(file), DataError, str(file), "all 2 rows are ties", "nothing to learn")


def test_empty_files_and_folders(on_pairs: Callable, pairs: Callable, refused: Callable, tmp_path: Path):
    refused(on_pairs(pairs(good=0)), DataError, "no rows")
    (tmp_path / "nothing").mkdir()
    refused(on_pairs(tmp_path / "nothing"), DataError, "cannot tell the format", "Set data.format")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and then the download broke off")
    refused(on_pairs(tmp_path / "torn.parquet"), DataError, "torn.parquet", "not a readable Parquet file")


def test_skipped_rows_are_listed_and_the_rest_trains(
    on_pairs: Callable, pairs: Callable, encoded: Callable, bomb: bytes, capsys: pytest.CaptureFixture
):
    odd = {"cut.jpg": encoded(9, "JPEG", size=64)[:600], "dot.png": encoded(9, size=1), "bomb.png": bomb}
    lines = [{"prompt": name, "chosen": f"images/{name}", "rejected": "images/0.png"} for name in odd]
    file = pairs(
        *lines,
        b'{"prompt": "caf\xe9"}',
        {"prompt": " ", "chosen": "images/0.png", "rejected": "images/1.png"},
        {"prompt": "same", "chosen": "images/1.png", "rejected": "images/1.png"},
    )
    for name, content in odd.items():
        (file.parent / "images" / name).write_bytes(content)
    result = mmalign.train(on_pairs(file, data={"on_bad_row": "skip"}))
    assert result.summary["status"] == "finished"
    assert "3 rows, 6 bad" in capsys.readouterr().out
    listed = [json.loads(line) for line in (result.folder / "bad_rows.jsonl").read_text().splitlines()]
    assert sorted(row["source"] for row in listed) == [f"{file}:{line}" for line in range(4, 10)]
    reasons = " / ".join(row["reason"] for row in listed)
    for says in ("truncated", "1x1 px", "more pixels", "not UTF-8", "is empty", "are the same image"):
        assert says in reasons


def test_nothing_left_after_skipping(on_pairs: Callable, pairs: Callable):
    file = pairs(b'{"prompt": "caf\xe9"}', good=0)
    with pytest.raises(DataError, match=r"no usable row: 1 bad.*not UTF-8"):
        mmalign.train(on_pairs(file, data={"on_bad_row": "skip"}))


# --- formats ----------------------------------------------------------------------------------------------------------


def test_pickapic_parquet_with_ties_trains(
    on_pairs: Callable, encoded: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
):
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels = [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (0.5, 0.5)]
    rows = []
    for i, (label_0, label_1) in enumerate(labels):
        row = {"caption": f"a fox {i}", "label_0": label_0, "label_1": label_1, "has_label": True, "ranking_id": i}
        row |= {"are_different": True, "created_at": datetime.datetime(2023, 5, 1), "user_id": 7}
        row["best_image_uid"] = {1.0: f"uid{i}-0", 0.0: f"uid{i}-1"}.get(label_0, "tie")
        for side in (0, 1):
            row |= {f"jpg_{side}": encoded(2 * i + side, "JPEG"), f"image_{side}_uid": f"uid{i}-{side}"}
        rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pickapic.parquet")
    dropped = mmalign.train(on_pairs(tmp_path / "pickapic.parquet"))
    assert dropped.summary["rows_seen"] == 4
    assert "3 rows, 2 ties dropped" in capsys.readouterr().out
    soft = on_pairs(tmp_path / "pickapic.parquet", data={"options": {"ties": "soft"}, "format": "pickapic"})
    mmalign.train({**soft, "output_dir": str(tmp_path / "soft")})
    assert "5 rows, 2 ties soft" in capsys.readouterr().out


def test_two_folders_train(on_pairs: Callable, refused: Callable, encoded: Callable, tmp_path: Path):
    for side, folder in enumerate(("w", "l")):
        (tmp_path / "pairs" / folder).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "pairs" / folder / f"{i}.png").write_bytes(encoded(2 * i + side))
            if folder == "w":
                (tmp_path / "pairs" / "w" / f"{i}.txt").write_text(f"a fox {i}")
    (tmp_path / "pairs" / "l" / "2.png").rename(tmp_path / "pairs" / "l" / "3.png")
    refused(on_pairs(tmp_path / "pairs"), DataError, "has no partner in", SKIP_HINT)
    (tmp_path / "pairs" / "l" / "3.png").rename(tmp_path / "pairs" / "l" / "2.png")
    assert mmalign.train(on_pairs(tmp_path / "pairs")).summary["status"] == "finished"


# --- cache ------------------------------------------------------------------------------------------------------------


def test_damaged_cache_entries_are_encoded_again(tiny: Callable, tmp_path: Path):
    cache = tmp_path / "cache"

    def first_line(name: str) -> dict:
        run = mmalign.train(tiny(data={"cache_dir": str(cache)}, output_dir=str(tmp_path / name))).folder
        return json.loads((run / "metrics.jsonl").read_text().splitlines()[0])

    whole = first_line("whole")
    entries = {entry: entry.read_bytes() for entry in cache.rglob("*.safetensors")}
    assert len(entries) == 25
    for number, damaged in enumerate((b"", entries[next(iter(entries))][:-7])):
        for entry in entries:
            entry.write_bytes(damaged)
        again = first_line(f"torn{number}")
        assert {entry: entry.stat().st_size for entry in entries} == {e: len(content) for e, content in entries.items()}
        assert again["chosen_error"] == pytest.approx(whole["chosen_error"], rel=1e-4)
    for entry, content in entries.items():
        entry.write_bytes(content[:-1] + bytes([content[-1] ^ 64]))
    with pytest.warns(RuntimeWarning, match=r"cache entry .* is damaged; it is encoded again"):
        again = first_line("flipped")
    # Approximately, here and above: an encoder rounds differently in batches of another shape or alignment.
    assert again["chosen_error"] == pytest.approx(whole["chosen_error"], rel=1e-4)
