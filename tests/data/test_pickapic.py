"""Pick-a-Pic in its published schema."""

from __future__ import annotations

import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmalign.data.load import load_rows
from mmalign.data.readers import BadRow, Dropped, detect_format, read_parquet, read_pickapic
from mmalign.types import DataError, Row

SCHEMA = pa.schema(
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", pa.string()),
        ("caption", pa.string()),
        ("created_at", pa.timestamp("ns")),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_0_url", pa.string()),
        ("image_1_uid", pa.string()),
        ("image_1_url", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()),
        ("__index_level_0__", pa.int64()),
    ]
)
FIRST, SECOND, TIE = (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)


@pytest.fixture
def write(tmp_path, encoded):
    """write(labels, {row: {column: value}}): a file whose row i shows images 2i and 2i+1."""

    def make(labels, changes=None, name="pickapic.parquet", images=True) -> Path:
        rows = []
        for i, (label_0, label_1) in enumerate(labels):
            best = {1.0: f"uid{2 * i}", 0.0: f"uid{2 * i + 1}"}.get(label_0, "tie")
            row = {
                "are_different": True,
                "best_image_uid": best,
                "caption": f"caption {i}",
                "created_at": datetime.datetime(2023, 5, 1),
                "has_label": True,
                "num_example_per_prompt": 1,
                "ranking_id": 100 + i,
                "user_id": 7,
                "__index_level_0__": i,
                "label_0": label_0,
                "label_1": label_1,
            }
            for side in (0, 1):
                row[f"image_{side}_uid"] = f"uid{2 * i + side}"
                row[f"image_{side}_url"] = f"https://gone.example/{2 * i + side}.jpg"
                row[f"jpg_{side}"] = encoded(2 * i + side, "JPEG")
                row[f"model_{side}"] = "a-model"
            rows.append({**row, **(changes or {}).get(i, {})})
        table = pa.Table.from_pylist(rows, SCHEMA)
        if not images:
            table = table.drop_columns(["jpg_0", "jpg_1"])
        pq.write_table(table, tmp_path / name)
        return tmp_path / name

    return make


def test_labels_decide_who_is_chosen(write, encoded):
    rows = list(read_pickapic(str(write([FIRST, SECOND]))))
    assert rows[0].chosen.read_bytes() == encoded(0, "JPEG")
    assert rows[0].rejected.read_bytes() == encoded(1, "JPEG")
    assert rows[1].chosen.read_bytes() == encoded(3, "JPEG")
    assert rows[1].rejected.read_bytes() == encoded(2, "JPEG")
    assert [(row.prompt, row.preference) for row in rows] == [("caption 0", 1.0), ("caption 1", 1.0)]
    assert rows[0].columns["model_0"] == "a-model"
    assert "jpg_0" not in rows[0].columns


LABELS = [FIRST, TIE, SECOND, TIE, TIE, FIRST, SECOND]


def test_ties_are_dropped_and_counted(write, data_config):
    row_set = load_rows(data_config(write(LABELS, {6: {"has_label": False}})), seed=0)
    assert [row.prompt for row in row_set.rows] == ["caption 0", "caption 2", "caption 5"]
    expected = {
        "rows": 3,
        "bad": 0,
        "ties_dropped": 3,
        "ties_soft": 0,
        "unlabelled_dropped": 1,
        "swapped": 0,
        "noisy": 0,
    }
    assert row_set.counts == expected


def test_ties_are_kept_as_soft_labels(write, data_config, encoded):
    row_set = load_rows(data_config(write(LABELS), options={"ties": "soft"}), seed=0)
    assert [row.preference for row in row_set.rows] == [1.0, 0.5, 1.0, 0.5, 0.5, 1.0, 1.0]
    assert row_set.rows[1].chosen.read_bytes() == encoded(2, "JPEG")
    assert row_set.counts["ties_soft"] == 3
    assert "ties_dropped" not in row_set.counts


@pytest.mark.parametrize(
    ("ties", "says"),
    [("drop", "all 2 labelled rows are ties and ties are dropped"), ("soft", "all 2 rows are ties")],
)
def test_nothing_but_ties_is_an_error(ties, says, write, data_config):
    with pytest.raises(DataError, match=says):
        load_rows(data_config(write([TIE, TIE]), options={"ties": ties}), seed=0)


def test_other_value_of_ties_is_a_config_error(write, data_config):
    with pytest.raises(ValueError, match=r"reader 'pickapic': option 'ties'.*'drop' or 'soft'.*got 'no'"):
        load_rows(data_config(write([FIRST]), options={"ties": "no"}), seed=0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"label_0": 0.7, "label_1": 0.3}, "labels 0.7/0.3 must be 1/0, 0/1 or 0.5/0.5"),
        ({"label_0": None}, "labels None/0.0 must be"),
        ({"label_1": 1.0}, "labels 1.0/1.0 must be"),
        ({"image_1_uid": "uid0"}, "both images have the uid 'uid0'"),
        ({"best_image_uid": "uid1"}, "contradict best_image_uid 'uid1'"),
        ({"caption": ""}, "'caption' is empty"),
        ({"caption": None}, "'caption' is None; it must be text"),
    ],
)
def test_bad_row_is_named(change, says, write):
    file = write([FIRST, FIRST], {0: change})
    bad, good = read_pickapic(str(file))
    assert isinstance(good, Row)
    assert isinstance(bad, BadRow)
    assert bad.source == f"{file}:0"
    assert says in bad.reason


def test_ids_survive_reordering_and_repeats(write):
    first = list(read_pickapic(str(write([FIRST, SECOND]))))
    swap = {
        0: {"image_0_uid": "uid2", "image_1_uid": "uid3", "ranking_id": 101, "best_image_uid": "uid2"},
        1: {"image_0_uid": "uid0", "image_1_uid": "uid1", "ranking_id": 100, "best_image_uid": "uid0"},
    }
    second = list(read_pickapic(str(write([FIRST, FIRST], swap, name="other.parquet"))))
    assert [row.id for row in second] == [first[1].id, first[0].id]


def test_variant_without_images_joins_a_folder(write, tmp_path, encoded):
    file = write([FIRST, SECOND], images=False)
    with pytest.raises(DataError, match=r"no column 'jpg_0'.*give their folder with data.options.images"):
        list(read_pickapic(str(file)))
    (tmp_path / "media").mkdir()
    for number in range(3):
        (tmp_path / "media" / f"uid{number}.jpg").write_bytes(encoded(number, "JPEG"))
    row, bad = read_pickapic(str(file), images=str(tmp_path / "media"))
    assert row.rejected.read_bytes() == encoded(1, "JPEG")
    assert "no image file uid3" in bad.reason


def test_dataset_saved_to_disk_is_recognised(write, tmp_path, encoded, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    saved = tmp_path / "saved"
    datasets.Dataset.from_parquet(str(write([SECOND, TIE])), cache_dir=str(tmp_path / "hf")).save_to_disk(str(saved))
    assert detect_format(str(saved)) == "pickapic"
    row, tie = read_pickapic(str(saved))
    assert row.chosen.read_bytes() == encoded(1, "JPEG")
    assert isinstance(tie, Dropped)


def test_general_reader_points_to_this_one(write):
    with pytest.raises(DataError, match=r"set data.format: pickapic"):
        list(read_parquet(str(write([FIRST]))))
