"""Prompts alone for online methods, and questions to evaluate language models on."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmalign.builtin import builtin_path
from mmalign.data.load import load_rows
from mmalign.data.questions import read_questions
from mmalign.data.readers import BadRow, detect_format, read_prompts
from mmalign.types import DataError, Row

# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "dev", "heldout"])
def test_bundled_prompts_are_rows_without_responses(split, data_config):
    path = f"builtin:attributes_{split}"
    assert detect_format(path) == "prompts"
    rows = load_rows(data_config(path), seed=0).rows
    captions = builtin_path(path).read_text().splitlines()
    assert [row.prompt for row in rows] == captions
    assert all(row.chosen is None and row.rejected is None for row in rows)
    assert len({row.id for row in rows}) == len(rows)


def test_lines_tables_and_objects(tmp_path, data_config):
    files = {
        "a.txt": "a red fox\n\na blue car\n",
        "a.tsv": "Prompt\tcategory\na red fox\tanimal\na blue car\tthing\n",
        "a.csv": "prompt,category\na red fox,animal\na blue car,thing\n",
        "a.jsonl": '{"caption": "a red fox", "category": "animal"}\n{"caption": "a blue car", "category": "thing"}\n',
        "a.json": '[{"prompt": "a red fox", "category": "animal"}, {"prompt": "a blue car", "category": "thing"}]',
    }
    ids = set()
    for name, content in files.items():
        path = tmp_path / name
        path.write_text(content)
        if name != "a.csv":
            assert detect_format(str(path)) == "prompts", name
        rows = list(load_rows(data_config(path, format="prompts"), seed=0).rows)
        assert [row.prompt for row in rows] == ["a red fox", "a blue car"]
        expected = {} if name == "a.txt" else {"category": "animal"}
        assert rows[0].columns == expected
        ids.add(tuple(row.id for row in rows))
    assert len(ids) == 1, "an id comes from the prompt, wherever it stands"


def test_ids_and_columns_of_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [{"prompt": "x", "id": 7, "a": 1, "b": 2}, {"prompt": "x"}, {"prompt": "x"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    first, second, third = read_prompts(str(path), columns=["a"])
    assert (first.id, first.columns) == ("7", {"a": 1})
    assert third.id == f"{second.id}#2"
    assert first.source == f"{path}:1"


def test_bad_prompts_are_named_and_the_rest_is_read(tmp_path, data_config):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "x"}\n{"prompt": ""}\n{"prompt": 3}\nno\n{"prompts": "x"}\n{"prompt": "x", "id": ""}\n')
    items = list(read_prompts(str(path)))
    assert isinstance(items[0], Row)
    assert all(isinstance(item, BadRow) for item in items[1:])
    assert [item.source for item in items[1:]] == [f"{path}:{line}" for line in range(2, 7)]
    says = ["the prompt is ''", "the prompt is 3", "not valid JSON", "no prompt column", "'id' is ''"]
    for item, text in zip(items[1:], says, strict=True):
        assert text in item.reason
        assert not item.reason.startswith(item.source)
    assert len(load_rows(data_config(path, on_bad_row="skip"), seed=0).rows) == 1


def test_file_that_means_pairs_is_not_taken_for_prompts(tmp_path):
    for number, line in enumerate(
        [
            {"prompt": "x", "chosen": "a.png", "rejected": "b.png"},
            {"prompt": "x", "choosen": "a.png", "rejected": "b.png"},
            {"prompt": "x", "image": "a.png"},
            {"messages": []},
        ]
    ):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(line))
        assert detect_format(str(path)) == "jsonl", line


# --- questions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["dev", "heldout"])
def test_bundled_questions_show_scenes_and_know_the_truth(split):
    from mmalign.synthetic.answers import score_caption

    rows = read_questions(f"builtin:scenes_{split}", limit=6)
    assert len(rows) == 6
    for row in rows:
        assert row.prompt.count("<image>") == len(row.images) == 1
        assert row.images[0].open().size == (48, 48)
        assert (row.chosen, row.rejected) == (None, None)
        assert score_caption(row.columns["truth"], row.columns["truth"]).exact
    longer = read_questions(f"builtin:scenes_{split}")
    assert [row.id for row in longer[:6]] == [row.id for row in rows]
    assert len({row.id for row in longer}) == len(longer) == 64


def test_questions_of_a_file_keep_their_truth(tmp_path, encoded):
    (tmp_path / "0.png").write_bytes(encoded(0))
    lines = [
        {"image": "0.png", "prompt": "what ?", "truth": "a fox", "id": "q1"},
        {"prompt": "two plus two ?", "truth": "four"},
        {"images": ["0.png"], "messages": [{"role": "user", "content": "what ?"}], "chosen": "a fox"},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    rows = read_questions(str(path))
    assert [row.prompt for row in rows] == ["<image>\nwhat ?", "two plus two ?", "<image>\nwhat ?"]
    assert (rows[0].id, rows[0].columns) == ("q1", {"truth": "a fox"})
    assert rows[0].images[0].read_bytes() == encoded(0)
    assert all(row.chosen is None for row in rows), "an answer in the file is not the model's"
    assert len(read_questions(str(path), limit=2)) == 2


def test_questions_of_a_table(tmp_path, encoded):
    record = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    image = pa.array([{"bytes": encoded(0), "path": None}, None], record)
    pq.write_table(pa.table({"image": image, "prompt": ["a ?", "b ?"], "truth": ["x", "y"]}), tmp_path / "q.parquet")
    first, second = read_questions(str(tmp_path / "q.parquet"))
    assert (first.prompt, first.columns, second.images) == ("<image>\na ?", {"truth": "x"}, ())
    assert first.images[0].read_bytes() == encoded(0)


def test_bad_questions_are_named(tmp_path, encoded):
    path = tmp_path / "q.jsonl"

    def write(*lines: dict) -> Path:
        path.write_text("\n".join(map(json.dumps, lines)))
        return path

    for line, says in [
        ({"prompt": "<image> what ?"}, r"q.jsonl:2: the prompt has 1 <image> mark\(s\) for 0 image"),
        ({"prompt": ""}, "q.jsonl:2: the prompt is empty"),
        ({"promt": "x"}, r"q.jsonl:2: no column 'prompt' \(did you mean 'promt'\?\)"),
        ({"prompt": "x", "image": "9.png"}, "q.jsonl:2: .*'9.png' does not exist"),
    ]:
        with pytest.raises(DataError, match=says):
            read_questions(str(write({"prompt": "fine ?"}, line)))
    path.write_text("\n")
    with pytest.raises(DataError, match=r"q.jsonl holds no question"):
        read_questions(str(path))
    with pytest.raises(
        DataError, match=r"no bundled questions 'builtin:scenes_def' \(did you mean 'builtin:scenes_dev'\?\)"
    ):
        read_questions("builtin:scenes_def")
