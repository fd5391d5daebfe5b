"""Prompt lists in the formats people have."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmalign.evaluation.prompts import read_prompt_rows, read_prompts


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_text(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "\ufeffa red circle\n\n  a blue square  \n# 1 dad\n")
    assert read_prompts(path) == ["a red circle", "a blue square", "# 1 dad"]
    assert read_prompts(str(path), limit=2) == ["a red circle", "a blue square"]


def test_partiprompts_tsv_keeps_quotation_marks(tmp_path: Path) -> None:
    path = write(tmp_path, "p.tsv", 'Prompt\tCategory\tNote\n"Hello" on a wall\tArts\t\r\n"a\tb\tc\n')
    rows = read_prompt_rows(path)
    assert [row.prompt for row in rows] == ['"Hello" on a wall', '"a']
    assert rows[0].columns == {"Category": "Arts", "Note": ""}


def test_geneval_jsonl_keeps_its_columns(tmp_path: Path) -> None:
    path = write(
        tmp_path, "p.jsonl", '{"tag": "counting", "include": [{"count": 2}], "prompt": "two cats\u2028"}\n\n"a dog"\n'
    )
    rows = read_prompt_rows(path)
    assert [row.prompt for row in rows] == ["two cats", "a dog"]
    assert rows[0].columns == {"tag": "counting", "include": [{"count": 2}]}


def test_csv_and_json(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path, "p.csv", 'id,Caption\n1,"a red circle, large"\n')) == ["a red circle, large"]
    assert read_prompts(write(tmp_path, "p.json", '["a", {"text": "b"}]')) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.tsv", "id\tname\n1\tx\n", r"p\.tsv:2: no prompt column.*found id, name"),
        ("p.tsv", "prompt\nx\ty\n", r"p\.tsv:2: 2 cells for 1 columns"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"\n', r"p\.jsonl:2: not JSON"),
        ("p.jsonl", '{"prompt": ""}\n', r"p\.jsonl:1: the prompt is ''"),
        ("p.jsonl", "3\n", r"p\.jsonl:1: expected a string or a record, found int"),
        ("p.json", "{}", "expected a list"),
        ("p.csv", 'prompt\n"a', "not CSV"),
        ("p.yaml", "a", r"unknown kind of prompt list '\.yaml'"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompts(write(tmp_path, name, text))


def test_missing_file_and_wrong_encoding(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("ein grüner Kreis".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        read_prompts(tmp_path / "latin.txt")
