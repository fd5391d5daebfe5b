"""Rows to token ids: stock placeholders, exact response spans, truncation that never cuts an image, named bad rows."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import ExifTags, Image

from mmalign.config import DataConfig, ModelConfig
from mmalign.policies.load import load_policy
from mmalign.types import DataError, ImageRef, Row, Turn

from .llava_fixture import (
    INLINE_TEMPLATE,
    JOINING_TEMPLATE,
    LLAVA15_TEMPLATE,
    build_llava,
    make_rows,
    picture,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llava")
    build_llava(path)
    return path


@pytest.fixture
def load(folder: Path, tmp_path: Path):
    """`load(template=…, max_length=…)`: the tiny model under another template or length limit, for inference."""

    def make(*, template: str | None = None, truncation: str = "error", max_length: int | None = None, **build):
        path = folder
        if template is not None or build:
            path = tmp_path / "other"
            build_llava(path, **({"template": template} if template is not None else {}), **build)
        data = DataConfig(path="unused", truncation=truncation, max_length=max_length)
        return load_policy(ModelConfig(family="llava", path=str(path)), data=data, device="cpu", train=False)

    return make


def decode(policy, ids: torch.Tensor) -> str:
    return policy.processor.tokenizer.decode(ids)


def row(**changes) -> Row:
    return replace(make_rows()[0], **changes)


# --- stock semantics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("index", range(4))
def test_prompt_and_answer_are_the_ids_of_the_stock_processor(load, strategy, index):
    """The whole answered dialogue through `processor.apply_chat_template(tokenize=True)` with pictures in it."""
    policy = load(strategy=strategy)
    one = make_rows()[index]
    images = iter(one.images)

    def content(text: str) -> list[dict]:
        parts = []
        for n, piece in enumerate(text.split("<image>")):
            parts += [{"type": "image", "image": next(images).open()}] if n else []
            parts += [{"type": "text", "text": piece.strip("\n")}] if piece.strip() else []
        return parts

    messages = [{"role": turn.role, "content": content(turn.text)} for turn in one.history]
    messages.append({"role": "user", "content": content(one.prompt)})
    ids_P, ids_T = policy.tokenize(one, "chosen")
    prompt = policy.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    messages.append({"role": "assistant", "content": [{"type": "text", "text": one.chosen}]})
    answered = policy.processor.apply_chat_template(messages, tokenize=True)
    assert ids_P.tolist() == prompt[0]
    assert torch.cat([ids_P, ids_T]).tolist() == answered[0]
    num_tokens = {"default": 16, "full": 17}[strategy]
    assert int((ids_P == policy.image_token_id).sum()) == num_tokens * len(one.images)


@pytest.mark.parametrize("size", [(40, 28), (64, 64), (9, 300)])
def test_features_and_placeholders_agree_whatever_the_picture_size(load, size):
    policy = load()
    (record,) = policy.encode_images([picture(0, size).open()])
    assert record["features"].shape == (16, 24)
    assert record["features"].device.type == "cpu"
    assert policy.num_image_tokens((size[1], size[0])) == 16


def test_features_do_not_depend_on_the_other_images_of_the_call(load):
    """Eleven images are two chunks; each comes back in its place."""
    policy = load()
    images = [picture(n).open() for n in range(11)]
    together = policy.encode_images(images)
    for image, record in zip(images, together, strict=True):
        alone = policy.encode_images([image])[0]["features"]
        assert torch.allclose(record["features"], alone, atol=1e-5)


def test_a_processor_that_announces_another_number_of_tokens_is_named(load):
    policy = load()
    policy.processor.num_additional_image_tokens = 0
    with pytest.raises(ValueError, match=r"16 features.*announces 15 image tokens.*num_additional_image_tokens"):
        policy.encode_images([picture(0).open()])


def test_chosen_and_rejected_share_their_prompt(load):
    policy = load()
    for one in make_rows():
        assert torch.equal(policy.tokenize(one, "chosen")[0], policy.tokenize(one, "rejected")[0])
        alone, empty = policy.tokenize(replace(one, chosen=None, rejected=None), "chosen")
        assert torch.equal(alone, policy.tokenize(one, "chosen")[0])
        assert len(empty) == 0


def test_answers_end_with_the_templates_end_of_turn(load):
    policy = load()
    assert decode(policy, policy.tokenize(row(), "chosen")[1]) == "a red circle . </s>"


def test_a_template_without_end_of_turn_gets_the_end_of_text_token_and_says_so_once(load, caplog):
    """LLaVA-1.5's own template ends answers with a space: trained on it, a model forgets where to stop."""
    with caplog.at_level(logging.WARNING):
        policy = load(template=LLAVA15_TEMPLATE)
        ids_P, ids_T = policy.tokenize(row(), "chosen")
        policy.tokenize(row(), "rejected")
    assert decode(policy, ids_P[:3]) == "USER : <image>"
    assert decode(policy, ids_P[-2:]) == "ASSISTANT :"
    assert decode(policy, ids_T) == "a red circle . </s>"
    assert sum("end of turn" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("template", [INLINE_TEMPLATE, LLAVA15_TEMPLATE], ids=["inline", "llava15"])
@pytest.mark.parametrize("answer", ["red <s> circle", "the </s> red", "<unk> red", "red <unk>"])
def test_special_tokens_inside_an_answer_do_not_end_it(load, template, answer):
    policy = load(template=template)
    assert decode(policy, policy.tokenize(row(chosen=answer), "chosen")[1]) == f"{answer} </s>"


@pytest.mark.parametrize("template", [LLAVA15_TEMPLATE, INLINE_TEMPLATE])
def test_an_answer_that_brings_its_end_of_text_gets_no_second_one(load, template):
    policy = load(template=template)
    assert decode(policy, policy.tokenize(row(chosen="red </s>"), "chosen")[1]) == "red </s>"


def test_an_added_end_of_turn_that_is_not_the_end_of_text_ends_the_answer(load):
    policy = load(template=INLINE_TEMPLATE.replace("' ' + eos_token", "' <end_of_turn>'"))
    policy.processor.tokenizer.add_tokens(["<end_of_turn>"], special_tokens=True)
    assert decode(policy, policy.tokenize(row(chosen="red"), "chosen")[1]).split() == ["red", "<end_of_turn>"]


def test_what_a_template_writes_after_the_end_of_turn_is_not_scored(load):
    """ChatML's line break there; here a full stop, as the tiny tokenizer knows no line break."""
    policy = load(template=INLINE_TEMPLATE.replace("' ' + eos_token", "' ' + eos_token + ' . <pad>'"))
    dialogue = row(history=(Turn("user", "<image> what ?"), Turn("assistant", "red")), prompt="and ?")
    ids_P, ids_T = policy.tokenize(dialogue, "chosen")
    assert decode(policy, ids_T) == "a red circle . </s>"
    assert "red </s> . <pad>" in decode(policy, ids_P)  # of earlier turns it is context, as the model will meet it


def test_a_template_that_moves_images_to_the_front_is_reported(load, caplog):
    with caplog.at_level(logging.WARNING):
        policy = load(template=LLAVA15_TEMPLATE)
        policy.tokenize(row(), "chosen")
        assert not any("before its text" in record.message for record in caplog.records)
        policy.tokenize(row(prompt="what is in <image> ?"), "chosen")
    assert sum("before its text" in record.message for record in caplog.records) == 1


def test_images_without_marks_are_shown_before_the_first_question(load):
    policy = load()
    marked = row(prompt="what is in the picture ?")
    assert torch.equal(policy.tokenize(marked, "chosen")[0], policy.tokenize(row(), "chosen")[0])
    dialogue = make_rows()[2]
    bare = replace(dialogue, history=(Turn("user", "is there a circle ?"), dialogue.history[1]))
    assert torch.equal(policy.tokenize(bare, "chosen")[0], policy.tokenize(dialogue, "chosen")[0])


def test_line_breaks_beside_a_mark_go_with_it(load):
    """`<image>\\nwhat`, `what\\n<image>` and `<image>what` are spellings of data sets; the template writes its own."""
    policy = load()
    expected = policy.tokenize(row(), "chosen")[0]
    for prompt in ("<image>what is in the picture ?", "<image>\n\nwhat is in the picture ?"):
        assert torch.equal(policy.tokenize(row(prompt=prompt), "chosen")[0], expected)


# --- truncation ----------------------------------------------------------------------------------------------------------


def test_an_over_long_row_is_an_error_that_says_what_to_do(load):
    policy = load(max_length=30)
    with pytest.raises(DataError, match=r"^f:1: the prompt has \d+ tokens, 32 of them of images.*data.max_length"):
        policy.tokenize(make_rows()[1], "chosen")
    with pytest.raises(DataError, match=r"^f:0: 25 prompt and 8 response tokens exceed the limit of 30.*truncation"):
        policy.tokenize(row(chosen="a red circle and a square ."), "chosen")
    assert not policy.truncated


def test_truncation_cuts_the_end_of_the_response(load, caplog):
    policy, whole = load(max_length=28, truncation="response"), load()
    long = row(chosen="a red circle and a blue square .")
    with caplog.at_level(logging.WARNING):
        ids_P, ids_T = policy.tokenize(long, "chosen")
        policy.tokenize(long, "chosen")
    expected_P, expected_T = whole.tokenize(long, "chosen")
    assert torch.equal(ids_P, expected_P)
    assert torch.equal(ids_T, expected_T[: 28 - len(ids_P)])
    assert policy.truncated == {"r0"}
    assert sum("cut" in record.message for record in caplog.records) == 1
    policy.tokenize(row(id="short", chosen="no ."), "chosen")
    assert policy.truncated == {"r0"}


def test_truncation_then_drops_the_oldest_exchange_without_an_image(load):
    """The picture's own exchange stays although it is the oldest, the system turn stays, and both sides keep one prompt."""
    history = (
        Turn("system", "yes ."),
        Turn("user", "<image>\nis there a circle ?"),
        Turn("assistant", "yes ."),
        Turn("user", "what colour is the circle ?"),
        Turn("assistant", "red ."),
        Turn("user", "is there a square ?"),
        Turn("assistant", "no ."),
    )
    long = row(prompt="how many ?", history=history, chosen="2 .", rejected="there are 3 .")
    whole = load()
    shorter = replace(long, history=(*history[:3], *history[5:]))
    expected = whole.tokenize(shorter, "chosen")[0]
    policy = load(max_length=len(expected) + 3, truncation="response")
    assert torch.equal(policy.tokenize(long, "chosen")[0], expected)
    assert torch.equal(policy.tokenize(long, "rejected")[0], expected)
    assert len(policy.tokenize(long, "rejected")[1]) == 3
    assert policy.truncated == {"r0"}


def test_a_response_of_which_no_text_is_left_is_an_error(load):
    """Cut to the special token that opens the answer; or of no character that the tokenizer knows."""
    template = INLINE_TEMPLATE.partition("{% if add_generation_prompt")[0]
    num_prompt = len(load(template=template).tokenize(row(), "chosen")[0])
    policy = load(template=template, max_length=num_prompt + 1, truncation="response")
    with pytest.raises(
        DataError, match=r"^f:0: nothing of the response 'a .* left in its 1 token.*raise data.max_length"
    ):
        policy.tokenize(row(chosen="a red circle ."), "chosen")
    policy = load(template=template, max_length=num_prompt + 2, truncation="response")
    assert decode(policy, policy.tokenize(row(chosen="a red circle ."), "chosen")[1]) == "<assistant> a"
    with pytest.raises(DataError, match=r"^f:0: nothing of the response '☃' is left in its 2 token.*does not know"):
        load().tokenize(row(chosen="☃"), "chosen")


def test_image_tokens_are_never_cut(load):
    policy = load(max_length=24, truncation="response")
    with pytest.raises(DataError, match=r"^f:1: .*32 of them of images.*no turn without an image is left to drop"):
        policy.tokenize(make_rows()[1], "chosen")


def test_max_length_above_the_models_positions_is_refused(load):
    with pytest.raises(ValueError, match=r"data.max_length = 500: the model has 128 positions"):
        load(max_length=500)


# --- bad rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": ()}, r"1 <image> mark\(s\) but 0 image\(s\)"),
        ({"images": (picture(0), picture(1))}, r"1 <image> mark\(s\) but 2 image\(s\)"),
        ({"prompt": "<image> <image> what ?"}, r"2 <image> mark\(s\) but 1 image\(s\)"),
        ({"chosen": ""}, r"chosen is empty \(''\)"),
        ({"chosen": " \n"}, r"chosen is empty"),
        ({"chosen": picture(0)}, r"chosen is a ImageRef, but a language model answers in text"),
        ({"chosen": "a <image> ."}, r"chosen holds <image>"),
        ({"history": (Turn("tool", "yes ."),)}, r"role 'tool' is unknown; use system, user, assistant"),  # type: ignore[arg-type]
    ],
)
def test_bad_rows_are_named_by_file_and_index(load, changes, message):
    with pytest.raises(DataError, match=rf"^f:0: {message}"):
        load().tokenize(row(**changes), "chosen")


def test_the_rejected_side_is_named(load):
    with pytest.raises(DataError, match=r"^f:0: rejected is empty"):
        load().tokenize(row(rejected=" "), "rejected")


def test_the_models_own_image_token_in_a_text_is_a_mismatch(load):
    """Another model family spells its placeholder otherwise than the row format does."""
    policy = load()
    policy.processor.image_token = "<image>"
    policy.text.image_token_id = policy.processor.tokenizer.convert_tokens_to_ids("cross")
    with pytest.raises(DataError, match=r"^f:3: the rendered prompt has 1 image tokens for 0 image"):
        policy.tokenize(replace(make_rows()[3], prompt="is the cross red ?"), "chosen")
    with pytest.raises(DataError, match=r"^f:3: the response holds the model's image token"):
        policy.tokenize(replace(make_rows()[3], chosen="a cross ."), "chosen")


def test_a_template_that_refuses_a_dialogue_is_quoted(load):
    template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}<image>"
    policy = load(template=template)
    with pytest.raises(DataError, match=r"^f:0: the chat template refuses the dialogue: roles must alternate"):
        policy.tokenize(row(history=(Turn("assistant", "yes ."),)), "chosen")


def test_a_tokenizer_that_joins_prompt_and_response_is_an_error(load):
    """Nothing between `picture?` and `no.`: cut apart they are other tokens than together."""
    from tokenizers.pre_tokenizers import WhitespaceSplit

    policy = load(template=JOINING_TEMPLATE)
    policy.processor.tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    with pytest.raises(DataError, match=r"^f:0: the prompt .* is not a token prefix of the answered prompt"):
        policy.tokenize(row(prompt="<image> what is in the picture"), "chosen")


def test_a_template_that_rewrites_the_prompt_once_answered_is_an_error(load):
    template = (
        "{% for m in messages %}{{ messages | length }}{% if m['content'][0]['type'] == 'image' %}<image>{% endif %}"
    )
    policy = load(template=template + "{{ m['content'][-1]['text'] }}{% endfor %}")
    with pytest.raises(DataError, match=r"^f:0: the chat template renders the prompt otherwise once it is answered"):
        policy.tokenize(row(), "chosen")


def test_a_template_that_drops_images_is_an_error(load):
    template = "{% for m in messages %}{{ m['content'][-1]['text'] + ' ' }}{% endfor %}"
    with pytest.raises(DataError, match=r"^f:0: the rendered prompt has 0 image tokens for 1 image"):
        load(template=template).tokenize(row(), "chosen")


def test_an_image_whose_size_cannot_be_read_is_named(load):
    """Only asked for where the number of tokens depends on the size."""
    policy = load()
    broken = ImageRef(content=b"no picture", source="pairs.parquet:3 image")
    policy.tokenize(row(images=(broken,)), "chosen")
    policy.text.num_image_tokens = lambda size_hw: (size_hw[0] // 4) * (size_hw[1] // 4)
    with pytest.raises(DataError, match=r"^pairs.parquet:3 image: cannot read the size"):
        policy.tokenize(row(images=(broken,)), "chosen")


def test_placeholders_follow_the_upright_size_of_each_picture(load):
    """Where the number of tokens depends on the size: a camera's rotation tag swaps height and width."""
    policy = load()
    policy.text.num_image_tokens = lambda size_hw: 2 * size_hw[0]
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 28)).save(buffer, format="JPEG", exif=exif)
    rotated = ImageRef(content=buffer.getvalue(), source="rotated")
    assert rotated.open().size == (28, 40)
    for image, height in ((picture(0, (40, 28)), 28), (rotated, 40)):
        ids_P, _ = policy.tokenize(row(images=(image,)), "chosen")
        assert int((ids_P == policy.image_token_id).sum()) == 2 * height
