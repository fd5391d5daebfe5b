"""The shipped tiny multimodal model and its preference pairs: stock loading, exact token counts, and what it knows."""

from __future__ import annotations

import json
from collections import Counter
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmalign.synthetic.answers import mentions, score_caption, short_answer_is_right, summary
from mmalign.synthetic.questions import (
    QUESTION_KINDS,
    QUESTION_WORDS,
    describe,
    evaluation_questions,
    sample_objects_scene,
    split_of,
)
from mmalign.synthetic.render import render
from mmalign.synthetic.scenes import VOCABULARY

torch = pytest.importorskip("torch")

ASSETS = Path(str(files("mmalign.assets")))
MODEL = ASSETS / "llava-tiny"
PAIRS = ASSETS / "llava-pairs"
IMAGE_TOKENS = 9
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def card(folder: Path) -> dict:
    return json.loads((folder / "card.json").read_text())


@pytest.fixture(scope="module")
def llava():
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(MODEL).eval(), AutoProcessor.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def pair_rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    from datasets import load_dataset

    cache = str(tmp_path_factory.mktemp("datasets"))
    return list(load_dataset("parquet", data_files=str(PAIRS / "train.parquet"), split="train", cache_dir=cache))


def generate(llava, prompts: list[str], images: list[list[np.ndarray]], **options) -> list[str]:
    model, processor = llava
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = processor(
        text=processor.apply_chat_template(chats, add_generation_prompt=True),
        images=[[Image.fromarray(image) for image in row] for row in images],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        out = model.generate(**inputs, **options)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def asked(llava, questions, **options) -> list[str]:
    return generate(llava, [q.prompt for q in questions], [list(q.images) for q in questions], **options)


# --- the folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "limit"), [(MODEL, 3_000_000), (PAIRS, 1_500_000)])
def test_sizes_cards_and_formats(folder: Path, limit: int) -> None:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in paths) <= limit
    assert {path.suffix for path in paths} <= {".json", ".jinja", ".md", ".safetensors", ".parquet"}
    facts = card(folder)
    assert facts["name"] == folder.name
    assert "preview" not in facts
    text = (folder / "README.md").read_text()
    assert facts["command"] in text
    assert str(facts["seed"]) in text


def test_half_precision_on_disk_and_full_precision_in_use(llava) -> None:
    from safetensors import safe_open

    with safe_open(MODEL / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F16"}  # noqa: SIM118
    assert {parameter.dtype for parameter in llava[0].parameters()} == {torch.float32}


def test_card_says_knows_but_hallucinates() -> None:
    captions = card(MODEL)["heldout"]["captions"]
    assert captions["greedy"]["hallucination"] < 0.10
    assert captions["greedy"]["recall"] > 0.80
    assert 0.20 < captions["sampled"]["hallucination"] < 0.40
    assert captions["sampled"]["mentioned"] == pytest.approx(1.0, abs=0.03)


# --- the processor ----------------------------------------------------------------------------------------------------


def test_stock_processor_expands_every_mark_to_its_tokens(llava) -> None:
    model, processor = llava
    image = Image.new("RGB", (64, 64))
    for num in (1, 2, 3):
        inputs = processor(text="<image> " * num, images=[image] * num, return_tensors="pt")
        assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == num * IMAGE_TOKENS
        assert inputs["pixel_values"].shape == (num, 3, 48, 48)


def test_every_word_of_the_world_is_one_token(llava) -> None:
    tokenizer = llava[1].tokenizer
    words = [*QUESTION_WORDS, *VOCABULARY]
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    assert all(len(word_ids) == 1 for word_ids in ids)
    assert tokenizer.unk_token_id not in {word_ids[0] for word_ids in ids}
    assert tokenizer("zebra", add_special_tokens=False).input_ids == [tokenizer.unk_token_id]
    text = "there is a red circle and an orange square ."
    written = tokenizer("There is a red circle, and an orange square.", add_special_tokens=False).input_ids
    assert tokenizer.decode(written) == text.replace(" and", " , and")
    assert tokenizer.vocab_size == llava[0].config.text_config.vocab_size


def test_chat_template_renders_all_turns_and_prompts_are_prefixes(llava) -> None:
    processor = llava[1]
    parts = [{"type": "image"}, {"type": "text", "text": "how many objects are there ?"}]
    chat = [{"role": "system", "content": "you are careful ."}, {"role": "user", "content": parts}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    answered = processor.apply_chat_template([*chat, {"role": "assistant", "content": "two"}])
    in_parts = [*chat, {"role": "assistant", "content": [{"type": "text", "text": "two"}]}]
    assert processor.apply_chat_template(in_parts) == answered
    assert answered.startswith(prompt)
    rendered = "<s><system> you are careful . <user> <image> how many objects are there ? <assistant> two </s>"
    assert " ".join(answered.split()) == rendered
    as_text = [chat[0], {"role": "user", "content": "<image>\nhow many objects are there ?"}]
    assert processor.apply_chat_template(as_text, add_generation_prompt=True).split() == prompt.split()


def test_template_marks_the_assistants_words(llava) -> None:
    tokenizer = llava[1].tokenizer
    chat = [{"role": "user", "content": "is there a red circle ?"}, {"role": "assistant", "content": "yes"}]
    encoded = tokenizer.apply_chat_template(
        chat,
        chat_template=llava[1].chat_template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    marked = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "yes </s>"


# --- what it knows ----------------------------------------------------------------------------------------------------


def test_greedy_captions_are_right_and_sampled_ones_hallucinate(llava) -> None:
    questions = evaluation_questions("dev", 150, seed=1)
    torch.manual_seed(0)
    rates = {}
    for name, options in (("greedy", {}), ("sampled", SAMPLING)):
        texts = asked(llava, questions, **options)
        rates[name] = summary([score_caption(text, q.truth) for text, q in zip(texts, questions, strict=True)])
    assert rates["greedy"]["hallucination"] < 0.06
    assert rates["greedy"]["recall"] > 0.90
    # Far above greedy, and not by saying more or less.
    assert 0.20 < rates["sampled"]["hallucination"] < 0.42
    assert rates["sampled"]["mentioned"] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("kind", ["exists", "colour", "shape", "count"])
def test_greedy_short_answers_are_right(llava, kind: str) -> None:
    questions = evaluation_questions("dev", 60, seed=1, kind=kind)
    texts = asked(llava, questions)
    assert np.mean([short_answer_is_right(t, q.truth) for t, q in zip(texts, questions, strict=True)]) > 0.9


def test_it_tells_several_images_apart_and_leans_to_the_first(llava) -> None:
    questions = evaluation_questions("dev", 120, seed=1, kind="colour", num_images=2)
    texts = asked(llava, questions)
    right: dict[str, list[bool]] = {"1": [], "2": []}
    from_first = []
    for text, question in zip(texts, questions, strict=True):
        asked_about = question.prompt.split("in image ")[1].split()[0]
        right[asked_about].append(short_answer_is_right(text, question.truth))
        if not right[asked_about][-1]:
            from_first.append(text == question.scenes[0].objects[0].colour)
    assert np.mean(right["1"]) > 0.95
    # Always answering about image 1 is right by coincidence about once in ten.
    assert 0.5 < np.mean(right["2"]) < 0.95
    assert np.mean(from_first) > 0.8


def test_answers_depend_on_the_image(llava) -> None:
    questions = evaluation_questions("dev", 60, seed=2)
    black = [[np.zeros_like(q.images[0])] for q in questions]
    texts = generate(llava, [q.prompt for q in questions], black)
    found = summary([score_caption(text, q.truth) for text, q in zip(texts, questions, strict=True)])
    assert found["recall"] < 0.2


def test_a_pipeline_sized_image_is_a_valid_input(llava) -> None:
    rng = np.random.default_rng(3)
    scenes = [sample_objects_scene("dev", rng) for _ in range(60)]
    texts = generate(llava, ["<image>\ndescribe the image ."] * 60, [[image] for image in render(scenes, 64)])
    found = summary([score_caption(t, describe(s.objects)) for t, s in zip(texts, scenes, strict=True)])
    assert found["hallucination"] < 0.08


def test_padding_to_the_longest_prompt_changes_no_answer(llava) -> None:
    questions = [evaluation_questions("dev", 2, 5, kind)[1] for kind in QUESTION_KINDS]
    together = asked(llava, questions)
    alone = [asked(llava, [question])[0] for question in questions]
    assert together == alone


# --- the pairs --------------------------------------------------------------------------------------------------------


def test_pairs_are_true_against_false(pair_rows: list[dict]) -> None:
    assert 800 <= len(pair_rows) <= 1000
    assert len({row["id"] for row in pair_rows}) == len(pair_rows)
    assert Counter(row["kind"] for row in pair_rows) == card(PAIRS)["pairs_by_kind"]
    for row in pair_rows:
        (turn,) = row["prompt"]
        assert turn["role"] == "user"
        assert [part["type"] for part in turn["content"]] == ["image", "text"]
        chosen, rejected = (row[side][0]["content"][0]["text"] for side in ("chosen", "rejected"))
        assert {row[side][0]["role"] for side in ("chosen", "rejected")} == {"assistant"}
        assert chosen == row["truth"]
        (image,) = row["images"]
        assert image.size == (48, 48)
        if row["kind"] == "caption":
            assert score_caption(rejected, row["truth"]).num_absent > 0
        else:
            assert short_answer_is_right(chosen, row["truth"])
            assert not short_answer_is_right(rejected, row["truth"])


def test_pairs_are_balanced_where_an_answer_could_be_learned_blindly(pair_rows: list[dict]) -> None:
    for kind in ("exists", "count"):
        truths = Counter(row["truth"] for row in pair_rows if row["kind"] == kind)
        assert len(set(truths.values())) == 1
    lengths = {
        side: np.mean([len(r[side][0]["content"][0]["text"].split()) for r in pair_rows if r["kind"] == "caption"])
        for side in ("chosen", "rejected")
    }
    assert lengths["rejected"] == pytest.approx(lengths["chosen"], rel=0.02)


def test_pairs_show_train_scenes_and_their_own_images(pair_rows: list[dict]) -> None:
    for row in pair_rows:
        if row["kind"] == "caption":
            assert split_of(m.object for m in mentions(row["truth"])) in ("train", None)
    counted = {row["id"]: row for row in pair_rows if row["kind"] == "count"}
    last = max(int(name.rsplit("-", 1)[1]) for name in counted)
    drawn = {f"own-{q.id}": q for q in evaluation_questions("train", last + 1, card(PAIRS)["seed"], "count")}
    for name, row in counted.items():
        assert row["truth"] == drawn[name].truth
        assert np.array_equal(np.asarray(row["images"][0]), drawn[name].images[0])
