"""From config to rows: format detection, bad rows, limit, swap, label noise, fingerprint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mmalign.data.features import ImageFeatures
from mmalign.data.load import drop_bad, fingerprint, load_rows, map_threaded, verify_images
from mmalign.data.readers import BadRow, detect_format
from mmalign.types import DataError


@pytest.fixture
def jsonl(tmp_path, encoded):
    """jsonl(n, {line index: changes}): a file with n pairs, every image its own file."""

    def make(number: int = 4, changes: dict[int, dict] | None = None) -> Path:
        lines = []
        for i in range(number):
            for seed in (2 * i, 2 * i + 1):
                (tmp_path / f"{seed}.png").write_bytes(encoded(seed))
            line = {"id": f"r{i}", "prompt": f"caption {i}", "chosen": f"{2 * i}.png", "rejected": f"{2 * i + 1}.png"}
            lines.append(json.dumps({**line, **(changes or {}).get(i, {})}))
        (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
        return tmp_path / "pairs.jsonl"

    return make


# --- bad rows ---------------------------------------------------------------------------------------------------------


def test_first_bad_row_stops_the_run_by_default(jsonl, data_config):
    file = jsonl(changes={2: {"prompt": ""}, 3: {"prompt": ""}})
    with pytest.raises(DataError, match=rf"^{file}:3: 'prompt' is empty.*data.on_bad_row: skip leaves bad rows out"):
        load_rows(data_config(file), seed=0)


def test_skipped_rows_are_counted_and_listed(jsonl, data_config, tmp_path):
    file = jsonl(changes={0: {"prompt": "Füchse ", "chosen": "fehlt-ü.png"}, 2: {"prompt": ""}})
    listed = tmp_path / "run" / "bad_rows.jsonl"
    row_set = load_rows(data_config(file, on_bad_row="skip"), seed=0, bad_rows_path=listed)
    assert [row.id for row in row_set.rows] == ["r1", "r3"]
    assert (row_set.counts["rows"], row_set.counts["bad"]) == (2, 2)
    lines = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
    assert [line["source"] for line in lines] == [f"{file}:1", f"{file}:3"]
    assert "fehlt-ü.png" in lines[0]["reason"]
    assert [path.name for path in listed.parent.iterdir()] == ["bad_rows.jsonl"]


def test_list_of_an_earlier_run_does_not_stay(jsonl, data_config, tmp_path):
    listed = tmp_path / "bad_rows.jsonl"
    listed.write_text("{}\n")
    load_rows(data_config(jsonl(), on_bad_row="skip"), seed=0, bad_rows_path=listed)
    assert not listed.exists()


def test_list_is_replaced_in_one_step(jsonl, data_config, tmp_path, monkeypatch):
    """Whoever reads while it is written sees the old list."""
    import os

    listed = tmp_path / "bad_rows.jsonl"
    listed.write_text("old\n")
    seen = []
    replace = os.replace

    def look_and_replace(source, target):
        seen.append((listed.read_text(), Path(source).read_text().count("\n")))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look_and_replace)
    file = jsonl(changes={2: {"prompt": ""}})
    load_rows(data_config(file, on_bad_row="skip"), seed=0, bad_rows_path=listed)
    assert seen == [("old\n", 1)]
    assert listed.read_text() != "old\n"


def test_no_usable_row_is_an_error_that_shows_the_first(jsonl, data_config, tmp_path):
    file = jsonl(2, {0: {"prompt": ""}, 1: {"prompt": ""}})
    with pytest.raises(DataError, match=r"no usable row: 2 bad.*pairs.jsonl:1: 'prompt' is empty"):
        load_rows(data_config(file, on_bad_row="skip"), seed=0)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty.jsonl: no rows; check data.path"):
        load_rows(data_config(tmp_path / "empty.jsonl"), seed=0)


def test_two_rows_with_one_id_are_an_error(jsonl, data_config):
    file = jsonl(changes={2: {"id": "r0"}})
    with pytest.raises(DataError, match=rf"{file}:3: the id 'r0' is already used by {file}:1; ids must be unique"):
        load_rows(data_config(file), seed=0)
    assert len(load_rows(data_config(file, on_bad_row="skip"), seed=0).rows) == 3


def test_only_ties_are_an_error(jsonl, data_config):
    with pytest.raises(DataError, match="all 2 rows are ties"):
        load_rows(data_config(jsonl(2, {0: {"preference": 0.5}, 1: {"preference": 0.5}})), seed=0)
    assert load_rows(data_config(jsonl(2, {0: {"preference": 0.5}})), seed=0).counts["ties_soft"] == 1


def test_limit_counts_usable_rows_and_stops_reading(jsonl, data_config):
    file = jsonl(5, {1: {"prompt": ""}, 4: {"prompt": ""}})
    row_set = load_rows(data_config(file, on_bad_row="skip", limit=3), seed=0)
    assert [row.id for row in row_set.rows] == ["r0", "r2", "r3"]
    assert row_set.counts["bad"] == 1


def test_reader_from_a_file_of_the_user(tmp_path, data_config, encoded):
    (tmp_path / "mine.py").write_text(
        "from mmalign.types import ImageRef, Row\n"
        "def read_mine(path, *, repeat: int = 1):\n"
        "    for i in range(repeat):\n"
        "        yield Row(f'{path}{i}', 'p', ImageRef(content=b'a'), ImageRef(content=b'b'))\n"
        "def read_wrong(path):\n"
        "    yield {'prompt': 'p'}\n"
    )
    spec = f"{tmp_path / 'mine.py'}:read_mine"
    assert [row.id for row in load_rows(data_config("x", format=spec, options={"repeat": 2}), seed=0).rows] == [
        "x0",
        "x1",
    ]
    with pytest.raises(ValueError, match=r"has no option 'repeats' \(did you mean 'repeat'\?\)"):
        load_rows(data_config("x", format=spec, options={"repeats": 2}), seed=0)
    with pytest.raises(DataError, match="gave a dict; it must yield Row, BadRow or Dropped"):
        load_rows(data_config("x", format=f"{tmp_path / 'mine.py'}:read_wrong"), seed=0)
    with pytest.raises(ValueError, match=r"unknown reader 'jsonlines' \(did you mean 'jsonl'\?\)"):
        load_rows(data_config("x", format="jsonlines"), seed=0)


# --- swap and label noise ---------------------------------------------------------------------------------------------


def chosen_names(row_set) -> dict[str, str]:
    return {row.id: row.chosen.path.name for row in row_set.rows}


def test_swap_exchanges_every_pair_with_its_scores(jsonl, data_config):
    file = jsonl(changes={0: {"score_chosen": 2.0, "score_rejected": 1.0}})
    swapped = load_rows(data_config(file, swap=True), seed=0)
    assert chosen_names(swapped) == {"r0": "1.png", "r1": "3.png", "r2": "5.png", "r3": "7.png"}
    assert (swapped.rows[0].score_chosen, swapped.rows[0].score_rejected) == (1.0, 2.0)
    assert swapped.counts["swapped"] == 4


def test_label_noise_depends_on_the_id_alone(jsonl, data_config, tmp_path):
    file = jsonl(60)
    clean = chosen_names(load_rows(data_config(file), seed=0))
    noisy = load_rows(data_config(file, label_noise=0.3), seed=0)
    flipped = {row_id for row_id, name in chosen_names(noisy).items() if name != clean[row_id]}
    assert noisy.counts["noisy"] == len(flipped)
    assert abs(len(flipped) / 60 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 60)
    # Another order and a limit leave the same rows flipped.
    (tmp_path / "reversed.jsonl").write_text("\n".join(reversed(file.read_text().splitlines())))
    part = chosen_names(load_rows(data_config(tmp_path / "reversed.jsonl", label_noise=0.3, limit=40), seed=0))
    assert {row_id for row_id, name in part.items() if name != clean[row_id]} == flipped & part.keys()
    # More noise flips more rows, and a superset; another seed flips others.
    more = chosen_names(load_rows(data_config(file, label_noise=0.6), seed=0))
    assert flipped < {row_id for row_id, name in more.items() if name != clean[row_id]}
    other = chosen_names(load_rows(data_config(file, label_noise=0.3), seed=1))
    assert flipped != {row_id for row_id, name in other.items() if name != clean[row_id]}


def test_swap_and_full_noise_cancel(jsonl, data_config):
    both = load_rows(data_config(jsonl(), swap=True, label_noise=1.0), seed=0)
    assert chosen_names(both) == {"r0": "0.png", "r1": "2.png", "r2": "4.png", "r3": "6.png"}


def test_unpaired_rows_cannot_be_swapped(jsonl, data_config):
    config = data_config(jsonl(), swap=True, options={"rejected_column": None})
    with pytest.raises(DataError, match=r"pairs.jsonl:1: a row without `rejected` cannot be swapped"):
        load_rows(config, seed=0)


# --- fingerprint ------------------------------------------------------------------------------------------------------


def test_fingerprint_changes_with_what_the_rows_say(jsonl, data_config):
    file = jsonl()
    same = load_rows(data_config(file), seed=0).fingerprint
    assert load_rows(data_config(file), seed=5).fingerprint == same
    others = [
        load_rows(data_config(file, swap=True), seed=0).fingerprint,
        load_rows(data_config(file, limit=3), seed=0).fingerprint,
        load_rows(data_config(jsonl(changes={1: {"prompt": "x"}})), seed=0).fingerprint,
        load_rows(data_config(jsonl(changes={1: {"preference": 0.9}})), seed=0).fingerprint,
        load_rows(data_config(jsonl(changes={1: {"chosen": "0.png"}})), seed=0).fingerprint,
    ]
    assert len({same, *others}) == 6


def test_fingerprint_sees_images_in_memory(make_rows):
    rows = make_rows(2)
    assert fingerprint(rows) == fingerprint(make_rows(2))
    assert fingerprint(rows) != fingerprint([rows[0].swapped(), rows[1]])


# --- images that only reading shows to be bad -------------------------------------------------------------------------


def test_verify_images_finds_what_load_cannot(jsonl, data_config, linear_policy, tmp_path):
    file = jsonl(5)
    (tmp_path / "2.png").write_bytes(b"broken")
    (tmp_path / "7.png").write_bytes((tmp_path / "6.png").read_bytes())
    row_set = load_rows(data_config(file), seed=0)
    features = ImageFeatures(linear_policy(), data_config(file), None, seed=0)
    with pytest.raises(DataError, match=rf"{file}:2: {file}:2 chosen: not an image"):
        verify_images(row_set, features, data_config(file))
    listed = tmp_path / "bad_rows.jsonl"
    kept = verify_images(row_set, features, data_config(file, on_bad_row="skip"), bad_rows_path=listed)
    assert [row.id for row in kept.rows] == ["r0", "r2", "r4"]
    assert (kept.counts["rows"], kept.counts["bad"]) == (3, 2)
    assert kept.fingerprint == fingerprint(kept.rows)
    reasons = [json.loads(line)["reason"] for line in listed.read_text().splitlines()]
    assert "not an image" in reasons[0]
    assert "same image, byte for byte" in reasons[1]


def test_dropping_every_row_is_an_error(jsonl, data_config):
    row_set = load_rows(data_config(jsonl(1)), seed=0)
    with pytest.raises(DataError, match="no usable row is left"):
        drop_bad(row_set, [BadRow("a:1", "broken", "r0")])


def test_threads_keep_the_order_and_pass_errors_on():
    assert list(map_threaded(lambda n: n * n, range(100), ahead=3)) == [n * n for n in range(100)]
    with pytest.raises(ZeroDivisionError):
        list(map_threaded(lambda n: 1 // n, [1, 0]))


# --- format: auto -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("builtin:synthetic", "synthetic"),
        ("builtin:synthetic_answers", "synthetic_answers"),
        ("builtin:relations_dev", "prompts"),
        ("owner/pairs", "hub"),
        ("yuvalkirstain/pickapic_v2", "pickapic"),
    ],
)
def test_format_of_names(path, expected):
    assert detect_format(path) == expected


def test_bundled_set_of_files_is_read_like_any_folder(data_config):
    assert detect_format("builtin:llava-pairs") == "parquet"
    rows = load_rows(data_config("builtin:llava-pairs", limit=3), seed=0).rows
    assert all(isinstance(row.chosen, str) and row.images and row.columns["truth"] == row.chosen for row in rows)


@pytest.mark.parametrize("path", ["no/such/folder", "/no/such.parquet", "pairs.jsonl", "./a/b"])
def test_absent_path_is_named(path):
    with pytest.raises(DataError, match=rf"data.path '{path}' does not exist \(relative paths start at .*owner/name"):
        detect_format(path)


def test_format_of_files(tmp_path):
    for name, expected in {"a.jsonl": "jsonl", "a.ndjson": "jsonl", "a.arrow": "hub"}.items():
        (tmp_path / name).write_text("")
        assert detect_format(str(tmp_path / name)) == expected
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(DataError, match=r"cannot tell the format of a .csv file; readable are .jsonl"):
        detect_format(str(tmp_path / "a.csv"))
    (tmp_path / "a.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match=r"a.parquet: not a readable Parquet file"):
        detect_format(str(tmp_path / "a.parquet"))


def test_undecidable_folder_says_what_it_saw(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(
        DataError, match=r"\(with notes.txt\) fits none of: folders \(w/ and l/\), jsonl.*Set data.format"
    ):
        detect_format(str(tmp_path))
    for name in ("w", "l"):
        (tmp_path / name).mkdir()
    assert detect_format(str(tmp_path)) == "folders"
    (tmp_path / "prompts.jsonl").write_text("")
    assert detect_format(str(tmp_path)) == "folders"
    (tmp_path / "pairs.jsonl").write_text("")
    with pytest.raises(DataError, match=r"fits several: folders \(w/ and l/\), jsonl"):
        detect_format(str(tmp_path))
