"""Parquet files and Hugging Face datasets: lazy cells, splits, schemas, bad input."""

from __future__ import annotations

import gc
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmalign.data import tables
from mmalign.data.load import load_rows
from mmalign.data.readers import BadRow, read_hub, read_parquet
from mmalign.data.tables import ParquetImageRef
from mmalign.types import DataError, ImageRef, Row


def write_parquet(path: Path, columns: dict, row_group_size: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


@pytest.fixture(scope="session")
def pair_columns(encoded):
    """Columns of n pairs: prompt, chosen and rejected as bytes; row i shows images 2i and 2i+1."""

    def make(number: int = 3) -> dict[str, list]:
        return {
            "prompt": [f"caption {i}" for i in range(number)],
            "chosen": [encoded(2 * i) for i in range(number)],
            "rejected": [encoded(2 * i + 1) for i in range(number)],
        }

    return make


@pytest.fixture
def hf_cache(tmp_path, monkeypatch) -> Path:
    """`load_dataset` converts local files below a cache; keep that in the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    return tmp_path


def check_images(rows: list[Row], encoded) -> None:
    for i, row in enumerate(rows):
        assert row.prompt == f"caption {i}"
        assert row.chosen.read_bytes() == encoded(2 * i)
        assert row.rejected.read_bytes() == encoded(2 * i + 1)


# --- Parquet ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_group_size", [None, 2])
def test_bytes_columns_are_read_when_asked(row_group_size, tmp_path, pair_columns, encoded):
    file = write_parquet(tmp_path / "p.parquet", {**pair_columns(5), "model": list("abcde")}, row_group_size)
    rows = list(read_parquet(str(file)))
    assert isinstance(rows[0].chosen, ParquetImageRef)
    assert [row.columns for row in rows] == [{"model": letter} for letter in "abcde"]
    assert [row.source for row in rows] == [f"{file}:{i}" for i in range(5)]
    check_images(rows, encoded)
    assert rows[4].rejected.read_bytes() == encoded(9)
    assert rows[0].chosen.read_bytes() == encoded(0)


def test_struct_cells_hold_bytes_or_paths(tmp_path, encoded):
    (tmp_path / "1.png").write_bytes(encoded(1))
    record = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {
        "prompt": ["caption 0"],
        "chosen": pa.array([{"bytes": encoded(0), "path": "x.png"}], record),
        "rejected": pa.array([{"bytes": None, "path": "1.png"}], record),
    }
    check_images(list(read_parquet(str(write_parquet(tmp_path / "p.parquet", columns)))), encoded)


def test_path_columns_are_checked_at_once(tmp_path, encoded):
    for seed in range(2):
        (tmp_path / f"{seed}.png").write_bytes(encoded(seed))
    columns = {
        "prompt": ["caption 0", "b", "c", "d"],
        "chosen": ["0.png", "0.png", "0.png", None],
        "rejected": ["1.png", "2.png", "0.png", "0.png"],
    }
    file = write_parquet(tmp_path / "p.parquet", columns)
    first, *bad = read_parquet(str(file))
    check_images([first], encoded)
    assert type(first.chosen) is ImageRef
    assert [item.source for item in bad] == [f"{file}:1", f"{file}:2", f"{file}:3"]
    assert "'rejected': image file '2.png' does not exist" in bad[0].reason
    assert "same image" in bad[1].reason
    assert "'chosen': an image must be a path, base64 text or bytes, found NoneType" in bad[2].reason


def test_names_numbers_ids_and_kept_columns(tmp_path, pair_columns):
    columns = pair_columns(2)
    columns = {"caption": columns["prompt"], "good": columns["chosen"], "bad": columns["rejected"], "uid": [5, 6]}
    columns |= {"margin": [1.5, None], "preference": [0.5, 1.0], "model": ["a", "b"], "extra": [[1], [2]]}
    file = write_parquet(tmp_path / "p.parquet", columns)
    names = {"prompt_column": "caption", "chosen_column": "good", "rejected_column": "bad", "id_column": "uid"}
    rows = list(read_parquet(str(file), **names, columns=["model"]))
    assert [row.id for row in rows] == ["5", "6"]
    assert [row.margin for row in rows] == [1.5, None]
    assert [row.preference for row in rows] == [0.5, 1.0]
    assert [row.columns for row in rows] == [{"model": "a"}, {"model": "b"}]
    assert [row.columns["extra"] for row in read_parquet(str(file), **names)] == [[1], [2]]
    with pytest.raises(DataError, match="'good' holds binary data"):
        list(read_parquet(str(file), **names, columns=["good"]))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"prompt_column": "prompts"},
            r"no column 'prompts' \(did you mean 'prompt'\?\). Columns: prompt, chosen, rejected",
        ),
        ({"rejected_column": "loser"}, "no column 'loser'"),
        ({"columns": ["model"]}, "no column 'model'"),
    ],
)
def test_absent_column_is_named_with_the_nearest(options, says, tmp_path, pair_columns):
    file = write_parquet(tmp_path / "p.parquet", pair_columns())
    with pytest.raises(DataError, match=says):
        list(read_parquet(str(file), **options))


def test_null_cell_and_shortened_file_are_named_when_read(tmp_path, pair_columns, encoded):
    columns = pair_columns(3)
    columns["rejected"][1] = None
    file = write_parquet(tmp_path / "p.parquet", columns)
    rows = list(read_parquet(str(file)))
    with pytest.raises(DataError, match=r"p.parquet:1 rejected: an image must be a path.*NoneType"):
        rows[1].rejected.read_bytes()
    write_parquet(file, pair_columns(1))
    tables._CELLS.forget()
    with pytest.raises(DataError, match=r"p.parquet:2 chosen: .* has only 1 rows now; it changed"):
        rows[2].chosen.read_bytes()


def test_damaged_file_is_named(tmp_path, pair_columns):
    file = write_parquet(tmp_path / "p.parquet", pair_columns())
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"p.parquet: not a readable Parquet file"):
        list(read_parquet(str(file)))


def test_splits_of_a_folder_are_never_mixed(tmp_path, pair_columns):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        write_parquet(tmp_path / "data" / f"{name}.parquet", pair_columns(2))
    with pytest.raises(DataError, match=r"holds the splits train, validation; choose one with data.options.split"):
        list(read_parquet(str(tmp_path)))
    with pytest.raises(DataError, match="no split 'test'; splits: train, validation"):
        list(read_parquet(str(tmp_path), split="test"))
    assert len(list(read_parquet(str(tmp_path), split="validation"))) == 2
    rows = list(read_parquet(str(tmp_path), split="train"))
    assert len({row.id for row in rows}) == 4


def test_files_with_other_columns_are_named(tmp_path, pair_columns):
    write_parquet(tmp_path / "a.parquet", pair_columns(1))
    write_parquet(tmp_path / "b.parquet", {"caption": ["x"]})
    with pytest.raises(DataError, match=r"b.parquet: no column 'prompt'"):
        list(read_parquet(str(tmp_path)))


def test_large_file_does_not_enter_memory(tmp_path, data_config):
    """4000 pairs of 8 KiB images, 64 MB: rows cost far less than images, and reading one image does not keep all."""
    number, size = 4000, 8192
    image = os.urandom(size - 4)
    columns = {
        "prompt": [f"caption {i % 100}" for i in range(number)],
        "chosen": [image + i.to_bytes(4, "big") for i in range(number)],
        "rejected": [image + (number + i).to_bytes(4, "big") for i in range(number)],
    }
    file = write_parquet(tmp_path / "p.parquet", columns, row_group_size=200)
    expected = columns["rejected"][2345]
    del columns
    gc.collect()
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    row_set = load_rows(data_config(file), seed=0)
    python_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(row_set.rows) == number
    assert python_bytes < number * 2 * size / 8
    assert pa.total_allocated_bytes() - before < 2**20
    assert row_set.rows[2345].rejected.read_bytes() == expected
    assert pa.total_allocated_bytes() - before < number * 2 * size / 8


def test_cells_are_read_by_several_threads(tmp_path, pair_columns, encoded):
    from mmalign.data.load import map_threaded

    rows = list(read_parquet(str(write_parquet(tmp_path / "p.parquet", pair_columns(40), row_group_size=3))))
    assert list(map_threaded(lambda row: row.rejected.read_bytes(), rows)) == [encoded(2 * i + 1) for i in range(40)]


# --- datasets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hf_dataset(pair_columns):
    import datasets

    features = {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Value("binary")}
    return datasets.Dataset.from_dict(pair_columns(), features=datasets.Features(features))


def test_dataset_saved_to_disk(hf_cache, hf_dataset, encoded, data_config):
    hf_dataset.save_to_disk(str(hf_cache / "saved"))
    rows = list(read_hub(str(hf_cache / "saved")))
    check_images(rows, encoded)
    assert rows[0].source == f"{hf_cache / 'saved'}[train]:0"
    check_images(load_rows(data_config(hf_cache / "saved"), seed=0).rows, encoded)


def test_dataset_dict_saved_to_disk(hf_cache, hf_dataset, encoded):
    import datasets

    folder = hf_cache / "saved"
    datasets.DatasetDict({"train": hf_dataset, "test": hf_dataset.select([0])}).save_to_disk(str(folder))
    check_images(list(read_hub(str(folder))), encoded)
    assert len(list(read_hub(str(folder), split="test"))) == 1
    with pytest.raises(DataError, match=r"no split 'dev'; splits: train, test"):
        list(read_hub(str(folder), split="dev"))


@pytest.mark.parametrize("whole_folder", [True, False])
def test_load_dataset_on_local_files(whole_folder, hf_cache, pair_columns, encoded):
    file = write_parquet(hf_cache / "local" / "train.parquet", pair_columns())
    rows = list(read_hub(str(file.parent if whole_folder else file)))
    check_images(rows, encoded)


def test_dataset_that_cannot_be_loaded_is_named(hf_cache):
    with pytest.raises(DataError, match=r"dataset 'nobody/nothing' \(split 'train'.*cannot be loaded"):
        list(read_hub("nobody/nothing"))
    (hf_cache / "a.xyz").write_text("")
    with pytest.raises(DataError, match=r"'.xyz' files cannot be loaded; allowed"):
        list(read_hub(str(hf_cache / "a.xyz")))


def test_bad_rows_of_a_dataset_are_named(hf_cache, pair_columns):
    import datasets

    columns = pair_columns(2)
    columns["prompt"][1] = ""
    datasets.Dataset.from_dict(columns).save_to_disk(str(hf_cache / "saved"))
    good, bad = read_hub(str(hf_cache / "saved"))
    assert isinstance(good, Row)
    assert isinstance(bad, BadRow)
    assert bad.source == f"{hf_cache / 'saved'}[train]:1"
