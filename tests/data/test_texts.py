"""Rows of text answers from JSONL, Parquet and datasets: content, ids, images by reference, told from image pairs."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmalign.data import tables
from mmalign.data.jsonl import JsonlImageRef
from mmalign.data.load import load_rows
from mmalign.data.readers import BadRow, read_hub, read_jsonl, read_parquet
from mmalign.data.tables import DatasetImageRef, ParquetImageRef
from mmalign.types import DataError, ImageRef, Row, Turn

RECORD = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.fixture
def media(tmp_path, encoded) -> Path:
    """A folder with images/0.png … images/5.png."""
    (tmp_path / "images").mkdir()
    for seed in range(6):
        (tmp_path / "images" / f"{seed}.png").write_bytes(encoded(seed))
    return tmp_path


def write_jsonl(path: Path, *lines: dict) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def answer(**more: object) -> dict:
    return {
        "images": ["images/0.png"],
        "prompt": "What is this?",
        "chosen": "A red fox.",
        "rejected": "A dog.",
        **more,
    }


def said(role: str, *parts: str) -> dict:
    """A message in parts; `@` is an image."""
    content = [{"type": "image"} if part == "@" else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


def only(items) -> Row | BadRow:
    (item,) = items
    return item


# --- JSONL ------------------------------------------------------------------------------------------------------------


def test_plain_row_shows_its_image_first(media, encoded):
    file = write_jsonl(
        media / "a.jsonl", answer(margin=2, score_chosen=0.5, truth="fox", rejected_images=["images/1.png"])
    )
    row = only(read_jsonl(str(file)))
    assert row.prompt == "<image>\nWhat is this?"
    assert (row.chosen, row.rejected, row.history) == ("A red fox.", "A dog.", ())
    assert [ref.read_bytes() for ref in row.images] == [encoded(0)]
    assert [ref.read_bytes() for ref in row.rejected_images] == [encoded(1)]
    assert (row.margin, row.score_chosen, row.columns) == (2.0, 0.5, {"truth": "fox"})
    assert row.source == f"{file}:1"
    assert row.images[0].source == f"{file}:1 images[0]"


@pytest.mark.parametrize(
    ("changes", "prompt"),
    [
        ({"prompt": "Look: <image> What?"}, "Look: <image> What?"),
        ({"image": "images/0.png", "images": None}, "<image>\nWhat is this?"),
        ({"images": "images/0.png"}, "<image>\nWhat is this?"),
        ({"images": ["images/0.png", "images/1.png"]}, "<image>\n<image>\nWhat is this?"),
        ({"images": []}, "What is this?"),
        ({"prompt": [said("user", "@", "What?")]}, "<image>\nWhat?"),
        ({"prompt": [said("user", "@", "\nWhat?")]}, "<image>\nWhat?"),
        ({"prompt": [said("user", "What?", "@")]}, "What?<image>"),
        ({"prompt": None, "messages": [said("user", "@", "What?")]}, "<image>\nWhat?"),
        ({"prompt": [{"role": "user", "content": "What?"}]}, "<image>\nWhat?"),
        ({"chosen": [said("assistant", "A red", " fox.")]}, "<image>\nWhat is this?"),
        ({"chosen": [{"role": "assistant", "content": "A red fox."}]}, "<image>\nWhat is this?"),
        ({"chosen": {"role": "assistant", "content": "A red fox."}}, "<image>\nWhat is this?"),
    ],
)
def test_spellings_of_one_row(changes, prompt, media):
    row = only(read_jsonl(str(write_jsonl(media / "a.jsonl", answer(**changes)))))
    assert isinstance(row, Row), row
    assert row.prompt == prompt
    assert (row.chosen, row.rejected) == ("A red fox.", "A dog.")
    assert len(row.images) == prompt.count("<image>")


def test_dialogue_keeps_its_turns(media):
    prompt = [
        {"role": "system", "content": "Be brief."},
        said("user", "@", "What is this?"),
        said("assistant", "A fox."),
        said("user", "And this?", "@"),
    ]
    file = write_jsonl(media / "a.jsonl", answer(prompt=prompt, images=["images/0.png", "images/1.png"]))
    row = only(read_jsonl(str(file)))
    turns = (Turn("system", "Be brief."), Turn("user", "<image>\nWhat is this?"), Turn("assistant", "A fox."))
    assert (row.history, row.prompt) == (turns, "And this?<image>")


def test_images_of_a_plain_dialogue_are_shown_in_its_first_user_turn(media):
    prompt = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    row = only(read_jsonl(str(write_jsonl(media / "a.jsonl", answer(prompt=prompt)))))
    assert [turn.text for turn in row.history] == ["system", "<image>\nuser", "assistant"]
    assert row.prompt == "user"


def test_prompt_inside_both_answers_is_what_they_share(media):
    shared = [said("user", "@", "What is this?")]
    line = answer(chosen=[*shared, said("assistant", "A fox.")], rejected=[*shared, said("assistant", "A dog.")])
    del line["prompt"]
    row = only(read_jsonl(str(write_jsonl(media / "a.jsonl", line))))
    assert (row.prompt, row.chosen, row.rejected) == ("<image>\nWhat is this?", "A fox.", "A dog.")


def test_answers_that_repeat_the_prompt_are_cut_to_the_answer(media):
    asked = {"role": "user", "content": "What is this?"}
    sides = {name: [asked, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    row = only(read_jsonl(str(write_jsonl(media / "a.jsonl", answer(images=[], **sides)))))
    assert (row.prompt, row.chosen, row.rejected) == ("What is this?", "chosen", "rejected")


def test_embedded_images_of_a_list_stay_in_the_file(tmp_path, encoded):
    texts = [base64.b64encode(encoded(seed)).decode() for seed in range(3)]
    lines = [answer(images=texts[:2]), answer(images={"bytes": texts[2], "path": None}, prompt="And this?")]
    first, second = read_jsonl(str(write_jsonl(tmp_path / "a.jsonl", *lines)))
    assert all(isinstance(ref, JsonlImageRef) and ref.content is None for ref in (*first.images, *second.images))
    assert [ref.read_bytes() for ref in (*first.images, *second.images)] == [encoded(seed) for seed in range(3)]


def test_ids_come_from_the_content(media):
    lines = [answer(), answer(rejected="A cat."), answer(images=["images/1.png"]), answer(id="mine"), answer()]
    ids = [row.id for row in read_jsonl(str(write_jsonl(media / "a.jsonl", *lines)))]
    assert len(set(ids)) == 5
    assert ids[3:] == ["mine", f"{ids[0]}#2"]
    write_jsonl(media / "b.jsonl", *reversed(lines[:3]))
    assert [row.id for row in read_jsonl(str(media / "b.jsonl"))] == ids[2::-1]


def test_unpaired_rows_and_other_names(media):
    line = {"picture": "images/0.png", "q": "What?", "a": "A fox.", "n": 1, "m": 2}
    file = write_jsonl(media / "a.jsonl", line)
    options = {"prompt_column": "q", "chosen_column": "a", "rejected_column": None, "images_column": "picture"}
    row = only(read_jsonl(str(file), **options, columns=["n"]))
    assert (row.prompt, row.chosen, row.rejected, row.columns) == ("<image>\nWhat?", "A fox.", None, {"n": 1})


BAD = [
    ({"images": ["images/0.png", "images/1.png"], "prompt": "<image> What?"}, r"has 1 <image> mark\(s\) for 2 image"),
    ({"images": [], "prompt": "<image> What?"}, r"has 1 <image> mark\(s\) for 0 image"),
    ({"prompt": [said("user", "What?")]}, r"has 0 <image> mark\(s\) for 1 image"),
    ({"prompt": [said("user", "@", "@", "What?")]}, r"has 2 <image> mark\(s\) for 1 image"),
    ({"rejected_images": ["images/1.png", "images/2.png"]}, "2 rejected_images for 1 images"),
    ({"images": ["images/9.png"]}, r"'images\[0\]': image file 'images/9.png' does not exist"),
    ({"images": [3]}, r"'images\[0\]': an image must be a path"),
    ({"chosen": ""}, "chosen is empty"),
    ({"rejected": " \n"}, "rejected is empty"),
    ({"chosen": None}, "'chosen' is null"),
    ({"rejected": "A red fox."}, "chosen and rejected are the same text"),
    ({"rejected": "A <image> dog."}, "rejected holds <image>"),
    ({"rejected": [said("assistant", "@", "A dog.")]}, "rejected holds <image>"),
    (
        {"prompt": [said("usr", "@", "What?")]},
        r"prompt\[0\] has the unknown role 'usr' \(did you mean 'user'\?\); roles: sys",
    ),
    ({"prompt": [said("tool", "x"), said("user", "@", "y")]}, r"prompt\[0\] has the unknown role 'tool'"),
    ({"chosen": [{"role": "gpt", "content": "x"}]}, r"chosen\[0\] has the unknown role 'gpt'"),
    ({"chosen": [said("assistant", "x"), said("user", "y")]}, "'chosen' must be one answer of the assistant.*, user"),
    ({"chosen": [said("user", "x")]}, "'chosen' must be one answer of the assistant.*found user"),
    ({"prompt": [said("user", "@", "x"), said("assistant", "y")]}, "ends with a turn of the assistant"),
    ({"prompt": ["What?"]}, r"prompt\[0\] is What\?; a message needs the keys role and content"),
    ({"prompt": []}, r"'prompt' is \[\]; it must be text or a list of"),
    ({"prompt": 3}, "'prompt' is 3; it must be text or a list of"),
    ({"prompt": "", "images": []}, "the prompt is empty; write a question"),
    ({"prompt": [{"role": "user", "content": None}]}, r"prompt\[0\]: content is None"),
    ({"prompt": [{"role": "user", "content": [{"type": "video"}]}]}, r"prompt\[0\]: part 0 is \{'type': 'video'\}"),
    ({"prompt": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]}, "part 0 holds the image itself"),
    ({"chosen": "half \ud83d"}, "half of a surrogate pair"),
    ({"margin": "large"}, "'margin' is 'large'"),
    ({"preference": 1.5}, "preference 1.5"),
    ({"id": ""}, "'id' is ''"),
]


@pytest.mark.parametrize(("changes", "says"), BAD)
def test_bad_row_is_named_by_its_line_and_the_rest_is_read(changes, says, media):
    file = write_jsonl(media / "a.jsonl", answer(), answer(**changes), answer(prompt="Else?"))
    first, bad, last = read_jsonl(str(file))
    assert isinstance(first, Row)
    assert isinstance(last, Row)
    assert isinstance(bad, BadRow), bad
    assert bad.source == f"{file}:2"
    assert re.search(says, bad.reason), bad.reason


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_absent_field_is_named_with_the_nearest(name, media):
    line = answer()
    line[name + "s"] = line.pop(name)
    _, bad = read_jsonl(str(write_jsonl(media / "a.jsonl", answer(), line)))
    assert bad.reason.startswith(f"no column '{name}' (did you mean '{name}s'?)")


def test_answers_that_share_no_turn_have_no_prompt(media):
    line = {"chosen": [said("assistant", "x")], "rejected": [said("assistant", "y")]}
    bad = only(read_jsonl(str(write_jsonl(media / "a.jsonl", line))))
    assert "'chosen' and 'rejected' share no turn" in bad.reason
    bad = only(read_jsonl(str(write_jsonl(media / "b.jsonl", {"chosen": "a b", "rejected": "a c"}))))
    assert "found only in messages" in bad.reason


def test_bad_rows_stop_or_are_counted(media, data_config, tmp_path):
    file = write_jsonl(media / "a.jsonl", answer(), answer(chosen=""), answer(rejected="A cat."))
    with pytest.raises(DataError, match=rf"^{file}:2: chosen is empty.*data.on_bad_row: skip"):
        load_rows(data_config(file), seed=0)
    row_set = load_rows(data_config(file, on_bad_row="skip"), seed=0, bad_rows_path=tmp_path / "bad.jsonl")
    assert (row_set.counts["rows"], row_set.counts["bad"]) == (2, 1)
    assert json.loads((tmp_path / "bad.jsonl").read_text())["source"] == f"{file}:2"


# --- images or texts --------------------------------------------------------------------------------------------------


def test_image_pairs_and_text_pairs_are_told_apart(media):
    image_pair = {"prompt": "a fox", "chosen": "images/0.png", "rejected": "images/1.png"}
    text_pair = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
    missing_pair = {**image_pair, "chosen": "images/9.png"}
    for line, kind in ((image_pair, ImageRef), (text_pair, str), (answer(), str)):
        assert isinstance(only(read_jsonl(str(write_jsonl(media / "a.jsonl", line)))).chosen, kind)
    bad = only(read_jsonl(str(write_jsonl(media / "a.jsonl", missing_pair))))
    assert "does not exist" in bad.reason, "the name of a missing image is not an answer"
    # The first row that tells decides; later ones that are otherwise are bad.
    good, bad = read_jsonl(str(write_jsonl(media / "a.jsonl", image_pair, text_pair)))
    assert isinstance(good.chosen, ImageRef)
    assert "image file '4' does not exist" in bad.reason


def test_ambiguous_file_asks(media):
    file = write_jsonl(media / "a.jsonl", answer(chosen="images/0.png", rejected="images/1.png"))
    with pytest.raises(DataError, match=rf"{file}:1: the row shows images beside its prompt.*data.options.responses"):
        list(read_jsonl(str(file)))
    assert only(read_jsonl(str(file), responses="text")).chosen == "images/0.png"
    assert isinstance(only(read_jsonl(str(file), responses="image")).chosen, ImageRef)


def test_file_whose_rows_do_not_tell_keeps_the_old_meaning(media):
    bad = only(read_jsonl(str(write_jsonl(media / "a.jsonl", {"prompt": "x", "chosen": 3, "rejected": 4}))))
    assert "an image must be a path" in bad.reason


# --- tables -----------------------------------------------------------------------------------------------------------


def answer_columns(encoded, number: int = 3, **more: object) -> dict:
    """Row i shows images 2i and 2i+1."""
    two = [
        [{"bytes": encoded(2 * i), "path": None}, {"bytes": encoded(2 * i + 1), "path": None}] for i in range(number)
    ]
    return {
        "images": pa.array(two, pa.list_(RECORD)),
        "prompt": [[said("user", "@", "@", f"Which {i}?")] for i in range(number)],
        "chosen": [[said("assistant", f"yes {i}")] for i in range(number)],
        "rejected": [[said("assistant", f"no {i}")] for i in range(number)],
        "kind": [f"k{i}" for i in range(number)],
        **more,
    }


def check_answers(rows: list[Row], encoded, kind: type) -> None:
    for i, row in enumerate(rows):
        assert row.prompt == f"<image><image>\nWhich {i}?"
        assert (row.chosen, row.rejected, row.columns) == (f"yes {i}", f"no {i}", {"kind": f"k{i}"})
        assert all(isinstance(ref, kind) for ref in row.images)
        assert [ref.read_bytes() for ref in row.images] == [encoded(2 * i), encoded(2 * i + 1)]


@pytest.fixture
def hf_cache(tmp_path, monkeypatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    return tmp_path


@pytest.mark.parametrize("row_group_size", [None, 2])
def test_parquet_lists_of_images_are_counted_and_read_when_asked(row_group_size, tmp_path, encoded, monkeypatch):
    pq.write_table(pa.table(answer_columns(encoded, 5)), tmp_path / "p.parquet", row_group_size=row_group_size)
    with monkeypatch.context() as patch:
        patch.setattr(ParquetImageRef, "read_bytes", lambda self: pytest.fail("read at load"))
        rows = list(read_parquet(str(tmp_path / "p.parquet")))
    check_answers(rows, encoded, ParquetImageRef)
    assert rows[1].images[1].source == f"{tmp_path / 'p.parquet'}:1 images[1]"


@pytest.mark.parametrize(
    "cells",
    [
        pa.array([b"0", None], pa.binary()),
        pa.array([{"bytes": b"0", "path": None}, None], RECORD),
        pa.array([[b"0"], []], pa.list_(pa.binary())),
        pa.array([[{"bytes": b"0", "path": None}], None], pa.list_(RECORD)),
    ],
    ids=["bytes", "record", "list of bytes", "list of records"],
)
def test_rows_with_and_without_an_image_in_one_table(cells, tmp_path, hf_cache):
    columns = {"image": cells, "prompt": ["a?", "b?"], "chosen": ["x", "x"], "rejected": ["y", "y"]}
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    for rows in (list(read_parquet(str(tmp_path / "p.parquet"))), list(read_hub(str(tmp_path / "p.parquet")))):
        assert [row.prompt for row in rows] == ["<image>\na?", "b?"]
        assert [ref.read_bytes() for ref in rows[0].images] == [b"0"]
        assert rows[1].images == ()


def test_parquet_image_paths_start_at_the_file(tmp_path, encoded):
    (tmp_path / "0.png").write_bytes(encoded(0))
    columns = {"prompt": ["a?"] * 2, "chosen": ["x"] * 2, "rejected": ["y"] * 2, "images": [["0.png"], ["1.png"]]}
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    good, bad = read_parquet(str(tmp_path / "p.parquet"))
    assert good.images[0].read_bytes() == encoded(0)
    assert bad.source.endswith("p.parquet:1")
    assert "'images[0]': image file '1.png' does not exist" in bad.reason


def test_image_count_mismatch_of_a_table_is_found_without_reading_images(tmp_path, encoded):
    columns = answer_columns(encoded, 2)
    columns["prompt"][1] = [said("user", "@", "Which?")]
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    good, bad = read_parquet(str(tmp_path / "p.parquet"))
    assert isinstance(good, Row)
    assert bad.source == f"{tmp_path / 'p.parquet'}:1"
    assert "1 <image> mark(s) for 2 image(s)" in bad.reason


def test_dataset_with_a_list_of_images(hf_cache, encoded):
    import datasets

    columns = answer_columns(encoded, 4)
    columns["images"] = [[{"bytes": c["bytes"].as_py(), "path": None} for c in cell] for cell in columns["images"]]
    dataset = datasets.Dataset.from_dict(columns)
    dataset = dataset.cast_column("images", datasets.List(datasets.Image()))
    dataset.save_to_disk(str(hf_cache / "saved"))
    rows = list(read_hub(str(hf_cache / "saved")))
    check_answers(rows, encoded, DatasetImageRef)


def test_item_that_a_changed_table_lacks_is_named(tmp_path, encoded):
    file = tmp_path / "p.parquet"
    pq.write_table(pa.table(answer_columns(encoded, 1)), file)
    row = only(read_parquet(str(file)))
    pq.write_table(pa.table(answer_columns(encoded, 1, images=pa.array([[]], pa.list_(RECORD)))), file)
    tables._CELLS.forget()
    with pytest.raises(DataError, match=r"p.parquet:0 images\[1\]: the table changed while it was in use"):
        row.images[1].read_bytes()


def test_large_table_of_answers_does_not_enter_memory(tmp_path, data_config):
    """1000 rows of two 16 KiB images, 32 MB."""
    import gc
    import os
    import tracemalloc

    image = os.urandom(16384)
    cell = [{"bytes": image + b"0", "path": None}, {"bytes": image + b"1", "path": None}]
    number = 1000
    columns = {
        "images": pa.array([cell] * number, pa.list_(RECORD)),
        "prompt": [f"Which {i}?" for i in range(number)],
        "chosen": ["x"] * number,
        "rejected": ["y"] * number,
    }
    pq.write_table(pa.table(columns), tmp_path / "p.parquet", row_group_size=100, use_dictionary=False)
    del columns
    gc.collect()
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    rows = load_rows(data_config(tmp_path / "p.parquet"), seed=0).rows
    python_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == number
    assert python_bytes < number * 2 * 16384 / 8
    assert pa.total_allocated_bytes() - before < 2**20
    assert rows[999].images[1].read_bytes() == image + b"1"
