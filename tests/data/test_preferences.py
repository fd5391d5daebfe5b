"""The published formats of text preferences: TRL, RLHF-V and RLAIF-V, mDPO, in the files they come in."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmalign.data.load import load_rows
from mmalign.data.readers import BadRow, detect_format, read_mdpo, read_rlhf_v, read_trl
from mmalign.types import DataError, Row, Turn

RECORD = pa.struct({"bytes": pa.binary(), "path": pa.string()})
BUNNY = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture
def hf_cache(tmp_path, monkeypatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    return tmp_path


def save(folder: Path, form: str, rows: list[dict], schema: pa.Schema | None = None) -> Path:
    """The rows as a file (or saved dataset) of the given form."""
    if form == "jsonl":
        path = folder / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
    elif form == "json":
        path = folder / "rows.json"
        path.write_text(json.dumps(rows, indent=1))
    elif form == "parquet":
        path = folder / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema), path)
    else:
        import datasets

        path = folder / "saved"
        datasets.Dataset(pa.Table.from_pylist(rows, schema)).save_to_disk(str(path))
    return path


def only(items) -> Row | BadRow:
    (item,) = items
    return item


# --- TRL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_trl_vision_preference(form, hf_cache, encoded, data_config):
    """The schema of trl-lib/rlaif-v: prompt, images, chosen, rejected."""
    text = {"type": "text", "text": "What is this?"}
    row = {
        "images": [{"bytes": encoded(0), "path": None}],
        "prompt": [{"role": "user", "content": [{"type": "image", "text": None}, text]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A fox."}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}],
    }
    messages = pa.list_(
        pa.struct({"role": pa.string(), "content": pa.list_(pa.struct({"type": pa.string(), "text": pa.string()}))})
    )
    schema = pa.schema({"images": pa.list_(RECORD), "prompt": messages, "chosen": messages, "rejected": messages})
    path = save(hf_cache, form, [row], schema)
    for read in (only(read_trl(str(path))), only(load_rows(data_config(path), seed=0).rows)):
        assert (read.prompt, read.chosen, read.rejected) == ("<image>\nWhat is this?", "A fox.", "A dog.")
        assert [ref.read_bytes() for ref in read.images] == [encoded(0)]


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "saved"])
def test_trl_plain_preferences(form, hf_cache):
    conversational = {
        "prompt": [{"role": "user", "content": "What color is the sky?"}],
        "chosen": [{"role": "assistant", "content": "It is blue."}],
        "rejected": [{"role": "assistant", "content": "It is green."}],
    }
    row = only(read_trl(str(save(hf_cache, form, [conversational]))))
    assert (row.prompt, row.chosen, row.rejected) == ("What color is the sky?", "It is blue.", "It is green.")
    implicit = {side: conversational["prompt"] + conversational[side] for side in ("chosen", "rejected")}
    (hf_cache / "implicit").mkdir()
    again = only(read_trl(str(save(hf_cache / "implicit", form, [implicit]))))
    assert (again.prompt, again.chosen, again.rejected, again.id) == (row.prompt, row.chosen, row.rejected, row.id)
    (hf_cache / "standard").mkdir()
    standard = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    row = only(read_trl(str(save(hf_cache / "standard", form, [standard]))))
    assert (row.prompt, row.chosen, row.rejected) == ("The sky is", " blue.", " green.")


def test_trl_table_without_answers_is_named(tmp_path):
    path = save(tmp_path, "parquet", [{"prompt": "x", "completion": "y"}])
    with pytest.raises(DataError, match=r"rows.parquet: no column 'chosen'.*Columns: prompt, completion"):
        list(read_trl(str(path)))


# --- RLHF-V and RLAIF-V -----------------------------------------------------------------------------------------------

ANSWERS = {"question": "What is this?", "chosen": "A fox.", "rejected": "A dog."}
ORIGIN = {"ds_name": "d", "origin_dataset": "coco", "origin_split": "{}", "idx": 7, "image_path": "a/b.jpg"}


@pytest.mark.parametrize("published", ["RLHF-V", "RLAIF-V"])
@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_rlhf_v_and_rlaif_v_as_published(published, form, hf_cache, encoded, data_config):
    answers = {"text": json.dumps(ANSWERS)} if published == "RLHF-V" else ANSWERS
    rows = [{**ORIGIN, "image": {"bytes": encoded(seed), "path": "x.jpg"}, **answers} for seed in (0, 1)]
    names = {name: pa.array([value]).type for name, value in {**ORIGIN, **answers}.items()}
    path = save(hf_cache, form, rows, pa.schema({**names, "image": RECORD}))
    assert detect_format(str(path)) == "rlhf_v"
    read = load_rows(data_config(path), seed=0).rows
    assert len({row.id for row in read}) == 2, "idx repeats, so it is no id"
    for seed, row in enumerate(read):
        assert (row.prompt, row.chosen, row.rejected) == ("<image>\nWhat is this?", "A fox.", "A dog.")
        assert [ref.read_bytes() for ref in row.images] == [encoded(seed)]
        assert row.columns == {name: ORIGIN[name] for name in ("ds_name", "origin_dataset", "origin_split", "idx")}


def test_rlhf_v_lines_with_paths(tmp_path, encoded):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "0.png").write_bytes(encoded(0))
    lines = [
        {"text": ANSWERS, "image_path": "0.png", "origin_dataset": "x"},
        {"text": "{", "image_path": "0.png"},
        {"text": [1], "image_path": "0.png"},
        {"text": {"question": "What?", "chosen": "x"}, "image_path": "0.png"},
        {**ANSWERS, "image_path": "1.png"},
    ]
    path = save(tmp_path, "jsonl", lines)
    assert detect_format(str(path)) == "rlhf_v"
    good, *bad = read_rlhf_v(str(path), media="media")
    assert (good.prompt, good.chosen) == ("<image>\nWhat is this?", "A fox.")
    assert [item.source for item in bad] == [f"{path}:{line}" for line in (2, 3, 4, 5)]
    for item, says in zip(
        bad, ("'text' is not JSON", "'text' holds list", "no column 'rejected'", "'1.png' does not"), strict=True
    ):
        assert says in item.reason


def test_rlhf_v_keeps_the_columns_asked_for(tmp_path, encoded):
    row = {**ORIGIN, "image": {"bytes": encoded(0), "path": None}, "text": json.dumps(ANSWERS)}
    path = save(tmp_path, "parquet", [row])
    assert only(read_rlhf_v(str(path), columns=["idx"])).columns == {"idx": 7}
    with pytest.raises(DataError, match="no column 'index'"):
        list(read_rlhf_v(str(path), columns=["index"]))


# --- mDPO -------------------------------------------------------------------------------------------------------------


def mdpo(prompt: str, **more: object) -> dict:
    return {"img_path": "images/0.png", "prompt": prompt, "chosen": "A fox.", "rejected": "A dog.", **more}


@pytest.fixture
def images(tmp_path, encoded) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(encoded(0))
    return tmp_path


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_mdpo_prompts_lose_the_template_of_bunny(form, images, encoded, data_config):
    path = save(images, form, [mdpo(f"{BUNNY} USER: <image>\nWhat is this? ASSISTANT:")])
    assert detect_format(str(path)) == "mdpo"
    row = only(load_rows(data_config(path), seed=0).rows)
    assert (row.prompt, row.chosen, row.rejected, row.history) == ("<image>\nWhat is this?", "A fox.", "A dog.", ())
    assert [ref.read_bytes() for ref in row.images] == [encoded(0)]
    assert only(read_mdpo(str(path), keep_system=True)).history == (Turn("system", BUNNY),)
    place = 0 if form == "json" else 1
    assert row.source == f"{path}:{place}"


@pytest.mark.parametrize("end", ["</s>", "<|endoftext|>", " "])
def test_mdpo_dialogue_is_taken_apart(end, images):
    prompt = f"{BUNNY} USER: What is this?\n<image> ASSISTANT: A fox.{end}USER: Sure? ASSISTANT:"
    row = only(read_mdpo(str(save(images, "json", [mdpo(prompt)]))))
    assert row.history == (Turn("user", "What is this?\n<image>"), Turn("assistant", "A fox."))
    assert row.prompt == "Sure?"


def test_mdpo_prompt_without_a_template_stays(images):
    row = only(read_mdpo(str(save(images, "json", [mdpo("Is ASSISTANT a word?\n<image>")]))))
    assert row.prompt == "Is ASSISTANT a word?\n<image>"


def test_mdpo_bad_rows_are_named(images):
    rows = [
        (mdpo("USER: <image>\nWhat? ASSISTANT: A fox."), "does not alternate up to an empty ASSISTANT"),
        (mdpo("USER: <image>\nWhat?"), "does not alternate"),
        (mdpo("USER: <image>\n<image> What? ASSISTANT:"), "2 <image> mark(s) for 1 image(s)"),
        (mdpo("<image>\nWhat?", img_path="images/9.png"), "'images/9.png' does not exist"),
        ({key: value for key, value in mdpo("What?").items() if key != "img_path"}, "no column 'img_path'"),
        (mdpo("<image>\nWhat?", rejected="A fox."), "the same text"),
        (mdpo("<image>\nWhat?", rejected=""), "rejected is empty"),
        (3, "expected a JSON object, found int"),
    ]
    path = save(images, "json", [mdpo("USER: What? ASSISTANT:"), *(row for row, _ in rows)])
    good, *bad = read_mdpo(str(path))
    assert good.prompt == "<image>\nWhat?", "a prompt without a mark shows its image first"
    assert [item.source for item in bad] == [f"{path}:{index}" for index in range(1, 9)]
    for item, (_, says) in zip(bad, rows, strict=True):
        assert says in item.reason


def test_json_that_is_no_list_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"prompt": 1}')
    with pytest.raises(DataError, match=r"a.json: expected a list of rows, found dict"):
        detect_format(str(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text("[")
    with pytest.raises(DataError, match=r"a.json: not readable JSON"):
        list(read_mdpo(str(tmp_path / "a.json")))


# --- auto -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("openbmb/RLHF-V-Dataset", "rlhf_v"),
        ("openbmb/RLAIF-V-Dataset", "rlhf_v"),
        ("fwnlp/mDPO-preference-data", "mdpo"),
        ("trl-lib/rlaif-v", "hub"),
        ("HuggingFaceH4/rlaif-v_formatted", "hub"),
    ],
)
def test_format_of_published_sets(path, expected):
    assert detect_format(path) == expected


def test_format_of_a_folder_with_one_json_file(images):
    save(images, "json", [mdpo("<image>\nWhat?")])
    assert detect_format(str(images)) == "mdpo"
    save(images, "json", [{"messages": [], "chosen": "x", "rejected": "y"}])
    assert detect_format(str(images)) == "trl"
