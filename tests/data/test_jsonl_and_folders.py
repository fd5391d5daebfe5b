"""The readers of plain files: JSONL with media or base64, and two folders of images."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest

from mmalign.data.jsonl import JsonlImageRef
from mmalign.data.load import load_rows
from mmalign.data.readers import BadRow, read_folders, read_jsonl
from mmalign.types import DataError, Row


@pytest.fixture
def media(tmp_path, encoded) -> Path:
    """A folder with images/0.png … images/5.png."""
    (tmp_path / "images").mkdir()
    for seed in range(6):
        (tmp_path / "images" / f"{seed}.png").write_bytes(encoded(seed))
    return tmp_path


def write_jsonl(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(texts) + b"\n")
    return path


def pair(first: object = "images/0.png", second: object = "images/1.png", **more: object) -> dict:
    return {"prompt": "a red fox", "chosen": first, "rejected": second, **more}


def only_bad(items) -> BadRow:
    (item,) = items
    assert isinstance(item, BadRow), item
    return item


# --- JSONL ------------------------------------------------------------------------------------------------------------


def test_paths_start_at_the_file(media, encoded, monkeypatch):
    file = write_jsonl(media / "pairs.jsonl", pair(margin=2, score_chosen=0.5, model="x"))
    monkeypatch.chdir("/")
    (row,) = read_jsonl(str(file))
    assert isinstance(row, Row)
    assert row.prompt == "a red fox"
    assert row.chosen.read_bytes() == encoded(0)
    assert row.rejected.read_bytes() == encoded(1)
    assert (row.margin, row.score_chosen, row.score_rejected, row.preference) == (2.0, 0.5, None, 1.0)
    assert row.columns == {"model": "x"}
    assert row.source == f"{file}:1"


def test_folder_with_one_file_and_media_option(media, encoded):
    (media / "table").mkdir()
    write_jsonl(media / "table" / "pairs.jsonl", pair("0.png", "1.png"))
    (row,) = read_jsonl(str(media / "table"), media="../images")
    assert row.rejected.read_bytes() == encoded(1)


def test_other_names_of_fields_and_unpaired_rows(media):
    file = write_jsonl(media / "a.jsonl", {"caption": "x", "image": "images/0.png", "uid": 7, "n": 1, "m": 2})
    options = {"prompt_column": "caption", "chosen_column": "image", "rejected_column": None, "id_column": "uid"}
    (row,) = read_jsonl(str(file), **options, columns=["n"])
    assert (row.id, row.prompt, row.rejected, row.columns) == ("7", "x", None, {"n": 1})


@pytest.mark.parametrize("form", ["base64", "data URI", "record"])
def test_embedded_images_stay_in_the_file(form, tmp_path, encoded):
    def text(seed: int) -> object:
        payload = base64.b64encode(encoded(seed)).decode()
        if form == "data URI":
            return f"data:image/png;base64,{payload}"
        return {"bytes": payload, "path": None} if form == "record" else payload

    lines = [pair(text(2 * i), text(2 * i + 1)) for i in range(3)]
    file = write_jsonl(tmp_path / "pairs.jsonl", *lines)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # a byte order mark
    rows = list(read_jsonl(str(file)))
    for i, row in enumerate(rows):
        assert isinstance(row.chosen, JsonlImageRef)
        assert row.chosen.content is None
        assert row.chosen.read_bytes() == encoded(2 * i)
        assert row.rejected.read_bytes() == encoded(2 * i + 1)


def test_embedded_image_in_a_changed_file_is_named(tmp_path, encoded):
    payload = [base64.b64encode(encoded(seed)).decode() for seed in (0, 1)]
    file = write_jsonl(tmp_path / "pairs.jsonl", pair(*payload))
    (row,) = read_jsonl(str(file))
    file.write_text('{"prompt": 1}\n')
    with pytest.raises(DataError, match=r"pairs.jsonl:1 chosen: the file changed while it was in use"):
        row.chosen.read_bytes()


def test_ids_do_not_depend_on_the_order_or_the_folder(media, tmp_path):
    first = write_jsonl(media / "a.jsonl", pair(), pair("images/2.png", "images/3.png"), pair())
    second = write_jsonl(media / "b.jsonl", pair("images/2.png", "images/3.png"), pair())
    ids = [row.id for row in read_jsonl(str(first))]
    assert len(set(ids)) == 3
    assert ids[2] == f"{ids[0]}#2"
    assert [row.id for row in read_jsonl(str(second))] == [ids[1], ids[0]]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"prompt": "h\xf4tel"}', "not UTF-8: byte 0xf4 at position 13"),
        (b'{"prompt": "x",}', "not valid JSON: .* at column 1[56]"),
        (b'["x"]', "expected a JSON object per line, found list"),
        (
            b'{"prompts": "x", "chosen": "images/0.png", "rejected": "images/1.png"}',
            r"no column 'prompt' \(did you mean 'prompts'\?\)",
        ),
        (b'{"prompt": "x", "chosen": "images/0.png", "reject": "images/1.png"}', "no column 'rejected'.*'reject'"),
        (
            b'{"prompt": "x", "chosen": "images/0.png", "rejected": "images/nope.png"}',
            "'images/nope.png' does not exist",
        ),
        (b'{"prompt": "x", "chosen": "images/0.png", "rejected": "images/0.png"}', "are the same image"),
        (b'{"prompt": "x", "chosen": "images/0.png", "rejected": "./images/0.png"}', "are the same image"),
        (b'{"prompt": "", "chosen": "images/0.png", "rejected": "images/1.png"}', "is empty.*allow_empty_prompt"),
        (b'{"prompt": " \\n", "chosen": "images/0.png", "rejected": "images/1.png"}', "is empty"),
        (b'{"prompt": null, "chosen": "images/0.png", "rejected": "images/1.png"}', "is None; it must be text"),
        (b'{"prompt": "\\ud83d", "chosen": "images/0.png", "rejected": "images/1.png"}', "surrogate"),
        (b'{"prompt": "x", "chosen": 3, "rejected": "images/1.png"}', "'chosen': an image must be a path.*int '3'"),
        (b'{"prompt": "x", "chosen": "", "rejected": "images/1.png"}', "the image path is empty"),
        (b'{"prompt": "x", "chosen": {"path": null}, "rejected": "images/1.png"}', "both null"),
        (
            b'{"prompt": "x", "chosen": "https://a.b/c.png", "rejected": "images/1.png"}',
            "is a URL; images are not fetched",
        ),
        (
            b'{"prompt": "x", "chosen": "data:image/png,abc", "rejected": "images/1.png"}',
            "must be of the form data:image/png;base64",
        ),
        (b'{"prompt": "x", "chosen": "data:image/png;base64,a", "rejected": "images/1.png"}', "cannot be decoded"),
        (b'{"prompt": "x", "chosen": "images/0.png", "rejected": "images/1.png", "margin": "1"}', "'margin' is '1'"),
        (b'{"prompt": "x", "chosen": "images/0.png", "rejected": "images/1.png", "margin": NaN}', "'margin' is nan"),
        (b'{"prompt": "x", "chosen": "images/0.png", "rejected": "images/1.png", "preference": 2}', "preference 2.0"),
        (b'{"prompt": "x", "chosen": "images/0.png", "rejected": "images/1.png", "id": ""}', "'id' is ''"),
    ],
)
def test_bad_line_is_named_by_number_and_the_rest_is_read(line, says, media):
    file = write_jsonl(media / "pairs.jsonl", pair(), b"", line, pair("images/2.png", "images/3.png"))
    items = list(read_jsonl(str(file)))
    assert [type(item) for item in items] == [Row, BadRow, Row]
    assert items[1].source == f"{file}:3"
    assert re.search(says, items[1].reason), items[1].reason


def test_empty_prompt_can_be_allowed(media):
    file = write_jsonl(media / "pairs.jsonl", pair(prompt=""))
    (row,) = read_jsonl(str(file), allow_empty_prompt=True)
    assert row.prompt == ""


def test_identical_base64_is_bad(tmp_path, encoded):
    payload = base64.b64encode(encoded(0)).decode()
    assert "same image" in only_bad(read_jsonl(str(write_jsonl(tmp_path / "p.jsonl", pair(payload, payload))))).reason


def test_folder_with_several_files_asks_for_one(media):
    write_jsonl(media / "a.jsonl", pair())
    write_jsonl(media / "b.jsonl", pair())
    with pytest.raises(DataError, match=r"exactly one .jsonl file.*a.jsonl, b.jsonl"):
        list(read_jsonl(str(media)))


def test_absent_file_and_media_folder_are_named(media):
    with pytest.raises(DataError, match=r"nope.jsonl' does not exist \(relative paths start at "):
        list(read_jsonl(str(media / "nope.jsonl")))
    with pytest.raises(DataError, match=r"media folder .*pictures' does not exist"):
        list(read_jsonl(str(write_jsonl(media / "a.jsonl", pair())), media="pictures"))


# --- two folders ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path, encoded) -> Path:
    """w/ and l/ with fox and sub/owl, prompts beside the winners."""
    for seed, (name, prompt) in enumerate({"fox": "a red fox", "sub/owl": "an owl"}.items()):
        for side, suffix in (("w", ".png"), ("l", ".webp")):
            path = tmp_path / side / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(2 * seed + (side == "l"), "WEBP" if suffix == ".webp" else "PNG"))
        (tmp_path / "w" / f"{name}.txt").write_text(f"{prompt}\n")
    return tmp_path


def test_names_pair_up_across_suffixes_and_sub_folders(folders, encoded):
    (folders / "w" / ".DS_Store").write_text("")
    rows = list(read_folders(str(folders)))
    assert [(row.id, row.prompt) for row in rows] == [("fox", "a red fox"), ("sub/owl", "an owl")]
    assert rows[0].chosen.read_bytes() == encoded(0)
    assert rows[1].rejected.read_bytes() == encoded(3, "WEBP")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompts.jsonl", '{"name": "fox", "prompt": "A"}\n{"file_name": "sub/owl.png", "prompt": "B"}\n'),
        ("prompts.csv", 'name,prompt\nfox,A\nsub/owl,"B"\n'),
        ("prompts.tsv", "file\tcaption\nfox.png\tA\nsub/owl.png\tB\n"),
    ],
)
def test_prompts_from_a_table_win_over_text_files(name, text, folders):
    (folders / name).write_text(text)
    assert [row.prompt for row in read_folders(str(folders))] == ["A", "B"]


def test_prompts_option_and_other_folder_names(folders):
    (folders / "w").rename(folders / "good")
    (folders / "l").rename(folders / "bad")
    (folders / "captions.csv").write_text("name,prompt\nfox,A\nsub/owl,B\n")
    options = {"chosen_folder": "good", "rejected_folder": "bad", "prompts": "captions.csv"}
    assert [row.prompt for row in read_folders(str(folders), **options)] == ["A", "B"]
    unpaired = list(read_folders(str(folders), chosen_folder="good", rejected_folder=None, prompts="captions.csv"))
    assert [row.rejected for row in unpaired] == [None, None]


def test_each_bad_pair_is_named(folders, encoded):
    (folders / "l" / "sub" / "owl.webp").unlink()
    (folders / "w" / "fox.jpg").write_bytes(encoded(9, "JPEG"))
    (folders / "w" / "notes.docx").write_text("")
    for side in ("w", "l"):
        (folders / side / "cat.png").write_bytes(encoded(7 + (side == "l")))
        (folders / side / "hen.png").write_bytes(encoded(17 + (side == "l")))
        (folders / side / "hen.txt").write_bytes(b"h\xf4tel")
    bad = [item for item in read_folders(str(folders)) if isinstance(item, BadRow)]
    reasons = {Path(item.source.split(":")[-1]).name: item.reason for item in bad}
    assert "has no partner in" in reasons["owl"]
    assert "same name as fox.jpg" in reasons["fox.png"]
    assert "not an image by its suffix" in reasons["notes.docx"]
    assert "no prompt for 'cat'" in reasons["cat"]
    assert "not UTF-8" in reasons["hen.txt"]
    assert len(bad) == 5


def test_disagreeing_and_empty_prompts_are_bad(folders):
    (folders / "l" / "fox.txt").write_text("another fox")
    (folders / "w" / "sub" / "owl.txt").write_text("\n")
    reasons = [item.reason for item in read_folders(str(folders))]
    assert "disagree" in reasons[0]
    assert "is empty" in reasons[1]


def test_absent_folder_says_what_is_there(folders):
    with pytest.raises(DataError, match=r"no folder 'winners'; folders there: l, w; name yours"):
        list(read_folders(str(folders), chosen_folder="winners"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("prompts.csv", b"name,text2\nfox,A\n", "needs one of the columns prompt, caption, text; found name, text2"),
        ("prompts.csv", b"name,prompt\nfox,h\xf4tel\n", "not UTF-8"),
        ("prompts.jsonl", b'{"name": "fox"\n', "prompts.jsonl:1: not valid JSON"),
        ("prompts.csv", b"name,prompt\nfox,A\nfox,B\n", "a second prompt for 'fox'"),
    ],
)
def test_bad_prompt_table_is_named(name, content, says, folders):
    (folders / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        list(read_folders(str(folders)))


# --- through load_rows ------------------------------------------------------------------------------------------------


def test_auto_finds_both_formats(media, folders, data_config):
    file = write_jsonl(media / "pairs.jsonl", pair())
    assert load_rows(data_config(file), seed=0).rows[0].prompt == "a red fox"
    file.unlink()
    assert [row.id for row in load_rows(data_config(folders), seed=0).rows] == ["fox", "sub/owl"]
