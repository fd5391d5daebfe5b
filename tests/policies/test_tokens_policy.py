"""The language-model policy around the score: views, adapters, export to stock loaders, answers, errors on loading."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mmalign.config import EmaConfig, LoraConfig, ModelConfig
from mmalign.policies.load import load_policy
from mmalign.policies.token_answers import GumbelNoise, gumbel

from .llava_fixture import WORDS, build_llava, context_of, make_rows, nudge, picture, public_scores, requests_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llava")
    build_llava(path)
    return path


@pytest.fixture
def load(folder: Path):
    def make(*, lora: str | None = "all", path: Path | None = None, train: bool = True, **model):
        adapter = None if lora is None else LoraConfig(rank=4, alpha=8, targets=lora)
        return load_policy(
            ModelConfig(family="llava", path=str(path or folder), lora=adapter, **model), device="cpu", train=train
        )

    return make


def scores(policy, view: str = "policy") -> torch.Tensor:
    with torch.no_grad(), policy.view(view):
        return policy.score(requests_of(policy, make_rows())).value_R


def stock(path: Path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)


# --- views ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", ["all", None])
def test_reference_is_the_model_as_loaded_whatever_training_did(load, folder, lora):
    policy = load(lora=lora)
    before = scores(policy)
    assert torch.equal(scores(policy, "reference"), before)
    nudge(policy)
    assert not torch.allclose(scores(policy), before, rtol=1e-3)
    assert torch.equal(scores(policy, "reference"), before)
    model, processor = stock(folder)
    with torch.no_grad():
        expected = torch.stack(public_scores(model, processor, make_rows(), policy))
    assert torch.allclose(before, expected, rtol=1e-5)
    policy.release_reference()
    assert torch.equal(scores(policy, "reference"), before)


def test_the_reference_is_the_policy_with_tied_embeddings_in_bf16(load, tmp_path):
    """Their weight is an embedding's too, which autocast leaves in fp32."""
    build_llava(tmp_path, tied=True)
    policy = load(lora=None, path=tmp_path, dtype="bf16")
    assert policy.model.get_input_embeddings().weight is policy.model.get_output_embeddings().weight
    before = scores(policy)
    assert torch.equal(scores(policy, "reference"), before)
    reference = policy.views.reference()
    assert reference.get_input_embeddings().weight.dtype == torch.float32
    assert reference.get_submodule("model.language_model.layers.0.mlp.up_proj").weight.dtype == torch.bfloat16
    nudge(policy)
    assert torch.equal(scores(policy, "reference"), before)


def test_the_reference_of_full_fine_tuning_shares_the_frozen_tower(load):
    """A second copy of the vision tower would cost memory and never differ."""
    policy = load(lora=None)
    own = policy.modules()
    with policy.view("reference"):
        copy = policy.modules()
    assert copy["vision_tower"] is own["vision_tower"]
    assert copy["language_model"] is not own["language_model"]
    counted = sum(p.numel() for module in own.values() for p in module.parameters())
    assert counted == sum(p.numel() for p in policy.model.parameters())


def test_ema_view_computes_with_the_average_and_switches_back(load):
    policy = load()
    nudge(policy)
    average = policy.start_ema(EmaConfig(decay=0.5))
    start = scores(policy)
    nudge(policy)
    moved = scores(policy)
    assert torch.equal(scores(policy, "ema"), start)
    assert torch.equal(scores(policy), moved)
    average.step([p for _, p in policy.trainable()])
    assert not torch.equal(scores(policy, "ema"), start)


def test_adapters_are_fp32_on_a_bf16_base_and_seeded(load, folder):
    policy = load(dtype="bf16")
    assert {p.dtype for _, p in policy.trainable()} == {torch.float32}
    assert policy.model.lm_head.weight.dtype == torch.bfloat16

    def first(seed: int) -> torch.Tensor:
        config = ModelConfig(family="llava", path=str(folder), lora=LoraConfig(rank=4))
        return load_policy(config, device="cpu", seed=seed).trainable()[0][1].detach()

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_inference_trains_nothing(load):
    policy = load(train=False)
    assert policy.trainable() == []
    assert not any(p.requires_grad for p in policy.model.parameters())


# --- export --------------------------------------------------------------------------------------------------------------


def test_the_adapter_loads_with_stock_transformers_and_peft(load, folder, tmp_path):
    """Every tensor, alpha other than rank, same scores; with the adapter off the base answers."""
    import peft

    policy = load()
    base = scores(policy)
    nudge(policy)
    policy.export(tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        saved = set(file.keys())
    assert len(saved) == len(policy.trainable())
    rows = make_rows()
    model, processor = stock(folder)
    model.load_adapter(str(tmp_path / "adapter"))
    loaded = [name for name, _ in model.named_parameters() if ".lora_" in name]
    assert len(loaded) == len(saved)
    with torch.no_grad():
        tuned = torch.stack(public_scores(model, processor, rows, policy))
        assert torch.allclose(tuned, scores(policy), rtol=1e-5)
        assert not torch.allclose(tuned, base, rtol=1e-3)
        model.disable_adapters()
        assert torch.allclose(torch.stack(public_scores(model, processor, rows, policy)), base, rtol=1e-5)
        wrapped = peft.PeftModel.from_pretrained(stock(folder)[0], tmp_path / "adapter")
        assert torch.allclose(torch.stack(public_scores(wrapped, processor, rows, policy)), tuned, rtol=1e-6)
        with wrapped.disable_adapter():
            assert torch.allclose(torch.stack(public_scores(wrapped, processor, rows, policy)), base, rtol=1e-5)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_alpha"] == 8


def test_export_writes_the_current_view(load, tmp_path):
    """The moving average is what is published; the reference of a LoRA run has no weights of its own."""
    policy = load(lora=None)
    policy.start_ema(EmaConfig(decay=0.5))
    start = scores(policy)
    nudge(policy)
    with policy.view("ema"):
        policy.export(tmp_path / "ema")
    policy.export(tmp_path / "policy")
    assert torch.allclose(scores(load(lora=None, path=tmp_path / "ema")), start, rtol=1e-6)
    assert torch.allclose(scores(load(lora=None, path=tmp_path / "policy")), scores(policy), rtol=1e-6)
    with policy.view("reference"):
        policy.export(tmp_path / "reference")
    assert torch.allclose(scores(load(lora=None, path=tmp_path / "reference")), start, rtol=1e-6)


def test_a_full_model_loads_with_stock_classes_and_its_processor(load, tmp_path):
    policy = load(lora=None)
    nudge(policy)
    policy.export(tmp_path / "full")
    model, processor = stock(tmp_path / "full")
    with torch.no_grad():
        expected = torch.stack(public_scores(model, processor, make_rows(), policy))
    assert torch.allclose(scores(policy), expected, rtol=1e-5)
    assert processor.chat_template == policy.processor.chat_template


def test_a_full_export_keeps_the_vision_tower_as_it_was_loaded(load, folder, tmp_path):
    """fp16 on disk, trained in bf16: the frozen tower is not rounded on the way through."""
    stock(folder)[0].half().save_pretrained(tmp_path / "half")
    stock(folder)[1].save_pretrained(tmp_path / "half")
    policy = load(lora=None, path=tmp_path / "half", dtype="bf16")
    nudge(policy)
    (features,) = [record["features"] for record in policy.encode_images([picture(0).open()])]
    assert features.dtype == torch.bfloat16
    policy.export(tmp_path / "full")
    before, after = (stock(tmp_path / name)[0].float().state_dict() for name in ("half", "full"))
    frozen = {name for name in before if ".vision_tower." in name}
    assert frozen
    assert {name for name in before if torch.equal(before[name], after[name])} >= frozen
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_stacked_adapters_stay_frozen_below_and_belong_to_the_reference(load, tmp_path):
    first = load()
    nudge(first)
    first.export(tmp_path / "first")
    tuned = scores(first)
    second = load(lora="attention", adapters=[str(tmp_path / "first")])
    assert torch.allclose(scores(second), tuned, rtol=1e-6)
    stacked = {name: p.clone() for name, p in second.model.named_parameters() if ".stacked_0." in name}
    assert stacked
    assert all(".mmalign." in name for name, _ in second.trainable())
    second.score(requests_of(second, make_rows())).value_R.sum().backward()
    nudge(second)
    assert torch.allclose(scores(second, "reference"), tuned, rtol=1e-6)
    assert not torch.allclose(scores(second), tuned, rtol=1e-3)
    for name, parameter in second.model.named_parameters():
        if name in stacked:
            assert torch.equal(parameter, stacked[name])
            assert parameter.grad is None
    second.export(tmp_path / "second")
    both = load(train=False, adapters=[str(tmp_path / "first"), str(tmp_path / "second")])
    assert torch.allclose(scores(both), scores(second), rtol=1e-6)


# --- identity ------------------------------------------------------------------------------------------------------------


def test_encode_keys_follow_what_they_name(load, tmp_path):
    """Another tower, another feature layer or another dtype: other image features. Another template: other prompts."""

    def keys(**build) -> tuple[str, str]:
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        dtype = build.pop("dtype", "fp32")
        build_llava(tmp_path / "model", **build)
        policy = load(lora=None, train=False, path=tmp_path / "model", dtype=dtype)
        return policy.encode_key("image"), policy.encode_key("prompt")

    image, prompt = keys()
    assert keys() == (image, prompt)
    assert keys(vision_feature_layer=-1)[0] != image
    assert keys(dtype="bf16")[0] != image
    other = keys(template="{% for m in messages %}<image> {{ m['role'] }}{% endfor %}")
    assert other[0] == image
    assert other[1] != prompt


def test_training_the_language_model_leaves_image_keys_alone(load):
    policy = load(lora=None)
    key = policy.encode_key("image")
    fingerprint = policy.reference_fingerprint()
    nudge(policy)
    policy._keys.clear()
    assert policy.encode_key("image") == key
    assert policy.reference_fingerprint() != fingerprint


# --- answers -------------------------------------------------------------------------------------------------------------


def texts(policy, rows, seeds, **options) -> list[str]:
    settings = {"temperature": 1.0, "max_new_tokens": 12} | options
    return [answer.text for answer in policy.answer(rows, seeds, **settings)]


def test_answers_do_not_depend_on_the_batch(load):
    """The same (seed, row) alone, in company and in another order: same answer, whatever the padding."""
    policy = load()
    rows = make_rows() * 3
    seeds = [0] * 4 + [1] * 4 + [2] * 4
    together = texts(policy, rows, seeds)
    assert len(set(together)) > 6
    alone = [texts(policy, [row], [seed])[0] for row, seed in zip(rows, seeds, strict=True)]
    assert together == alone
    assert texts(policy, rows[::-1], seeds[::-1]) == together[::-1]


def test_greedy_answers_are_those_of_stock_generate(load, folder):
    """From pixels, one prompt at a time, through the public class."""
    policy = load()
    nudge(policy)
    model, processor = stock(folder)
    ours = texts(policy, make_rows(), [0] * 4, temperature=0)
    with policy.view("reference"):
        base = texts(policy, make_rows(), [0] * 4, temperature=0)
    assert ours != base
    assert [stock_answer(model, processor, policy, row) for row in make_rows()] == base


def test_the_exported_adapter_answers_in_stock_peft_and_switched_off_as_the_base(load, folder, tmp_path):
    import peft

    policy = load()
    nudge(policy, 0.2)
    policy.export(tmp_path)
    model, processor = stock(folder)
    base = [stock_answer(model, processor, policy, row) for row in make_rows()]
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    tuned = [stock_answer(wrapped, processor, policy, row) for row in make_rows()]
    assert tuned == texts(policy, make_rows(), [0] * 4, temperature=0)
    assert tuned != base
    with wrapped.disable_adapter():
        assert [stock_answer(wrapped, processor, policy, row) for row in make_rows()] == base


def stock_answer(model, processor, policy, row) -> str:
    """Greedy, by the public class's own `generate`."""
    ids_P = policy.tokenize(row, "chosen")[0]
    inputs = {"input_ids": ids_P[None], "attention_mask": torch.ones(1, len(ids_P), dtype=torch.long)}
    if row.images:
        inputs |= processor.image_processor(images=[ref.open() for ref in row.images], return_tensors="pt")
    new = model.generate(**inputs, do_sample=False, max_new_tokens=12, pad_token_id=0)[0, len(ids_P) :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("lora", ["all", None])
def test_base_and_tuned_answers_come_from_the_same_noise(load, lora):
    """An untrained policy answers exactly as its reference, also when sampling; a trained one does not."""
    policy = load(lora=lora)
    rows, seeds = make_rows() * 2, [0] * 4 + [1] * 4

    def reference() -> list[str]:
        with policy.view("reference"):
            return texts(policy, rows, seeds)

    base = reference()
    assert texts(policy, rows, seeds) == base
    nudge(policy, 0.2)
    assert texts(policy, rows, seeds) != base
    assert reference() == base


def test_sampling_follows_the_models_distribution(load):
    """First tokens of 400 seeds against the exact softmax: every frequency within 4.5 standard errors."""
    policy = load()
    row = make_rows()[3]
    num, temperature = 400, 1.7
    ids_P = policy.tokenize(row, "chosen")[0]
    with torch.no_grad():
        probs = torch.softmax(policy.model(input_ids=ids_P[None]).logits[0, -1] / temperature, -1)
    noise = GumbelNoise([(seed, row.id) for seed in range(num)], temperature)
    logits = torch.log(probs) * temperature
    first = noise(torch.zeros(num, 0), logits.expand(num, -1)).argmax(-1)
    counts = torch.bincount(first, minlength=len(WORDS)) / num
    assert bool(((counts - probs).abs() <= 4.5 * (probs * (1 - probs) / num).sqrt() + 1e-9).all())
    answers = policy.answer([row] * 40, list(range(40)), temperature=temperature, max_new_tokens=1)
    expected = policy.processor.tokenizer.batch_decode(first[:40, None], skip_special_tokens=True)
    assert [answer.text for answer in answers] == [text.strip() for text in expected]


def test_noise_is_standard_gumbel_and_keyed_by_seed_row_and_step():
    noise = gumbel(200_000, 0, "row", 0)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert torch.equal(noise, gumbel(200_000, 0, "row", 0))
    for other in ((1, "row", 0), (0, "other", 0), (0, "row", 1)):
        assert not torch.equal(noise[:50], gumbel(200_000, *other)[:50])


def test_a_checkpoints_generation_settings_do_not_enter(folder, load, tmp_path):
    """A repetition penalty would measure another distribution than the trained one; the export keeps the file's settings."""
    path = tmp_path / "penalised"
    shutil.copytree(folder, path)
    file = path / "generation_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"repetition_penalty": 5.0, "do_sample": True, "top_k": 2}))
    policy, plain = load(path=path, lora=None), load()
    rows, seeds = make_rows(), [0] * 4
    assert texts(policy, rows, seeds) == texts(plain, rows, seeds)
    policy.export(tmp_path / "full")
    assert json.loads((tmp_path / "full" / "generation_config.json").read_text())["repetition_penalty"] == 5.0


def test_answers_with_given_features_are_those_with_pictures(load):
    policy = load()
    rows = make_rows()
    features = [context_of(policy, row).features for row in rows]
    assert texts(policy, rows, [3] * 4, features=features) == texts(policy, rows, [3] * 4)
    black = [tuple(torch.zeros_like(f) for f in of_row) for of_row in features]
    blind = texts(policy, rows, [3] * 4, features=black)
    assert blind != texts(policy, rows, [3] * 4)
    assert blind[3] == texts(policy, rows, [3] * 4)[3]


def test_an_answer_says_how_it_was_made(load):
    policy = load()
    row = make_rows()[0]
    (answer,) = policy.answer([row], [7], temperature=0.5, max_new_tokens=3)
    assert (answer.prompt, answer.seed, answer.temperature, answer.images) == (row.prompt, 7, 0.5, row.images)
    assert len(policy.processor.tokenizer(answer.text, add_special_tokens=False)["input_ids"]) <= 3


def test_each_picture_of_a_batch_is_encoded_once(load, monkeypatch):
    policy = load()
    seen = Counter()
    encode = policy.encode_images

    def counted(images):
        seen["images"] += len(images)
        return encode(images)

    monkeypatch.setattr(policy, "encode_images", counted)
    same = replace(make_rows()[0], id="same", images=(picture(0),))
    texts(policy, [*make_rows(), same], [0] * 5)
    assert seen["images"] == 3


def test_answer_arguments_are_checked(load):
    policy = load()
    with pytest.raises(ValueError, match="4 rows but 1 seeds"):
        texts(policy, make_rows(), [0])
    with pytest.raises(ValueError, match=r"temperature = -1"):
        texts(policy, make_rows(), [0] * 4, temperature=-1)


def test_generation_still_caches_under_gradient_checkpointing(load):
    """Checkpointed layers drop the cache: answers would be wrong, not slow."""
    rows = make_rows()
    assert texts(load(gradient_checkpointing=True), rows, [0] * 4) == texts(load(), rows, [0] * 4)


def test_the_bundled_model_scores_and_answers():
    """The real files of `builtin:llava-tiny`: shared rows = public forwards; greedy answers are its own words."""
    policy = load_policy(
        ModelConfig(family="llava", path="builtin:llava-tiny", lora=LoraConfig(rank=4, targets="all")), device="cpu"
    )
    rows = [
        replace(row, prompt=row.prompt.replace("picture", "image"), chosen="there is a red circle .", rejected="no")
        for row in make_rows()
    ]
    with torch.no_grad():
        expected = torch.stack(public_scores(policy.model, policy.processor, rows, policy))
        value_R = policy.score(requests_of(policy, rows)).value_R
    assert torch.allclose(value_R, expected, rtol=1e-5)
    assert all(texts(policy, rows, [0] * 4, temperature=0))


# --- loading -------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_loaded_is_named(load, folder, tmp_path):
    with pytest.raises(ValueError, match=r"cannot load '/no/such/model'.*Give a local folder"):
        load(path=Path("/no/such/model"))
    with pytest.raises(ValueError, match=r"cannot load '/no/such/adapter'"):
        load(adapters=["/no/such/adapter"])
    adapter = tmp_path / "adapter"
    load().export(adapter)
    with pytest.raises(ValueError, match=r"model.adapters needs model.lora"):
        load(lora=None, adapters=[str(adapter)])
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"cannot load '.*broken'"):
        load(path=broken)


def test_a_base_that_is_gone_when_the_reference_is_made_is_named(load, folder, tmp_path):
    path = tmp_path / "base"
    shutil.copytree(folder, path)
    policy = load(lora=None, path=path)
    path.rename(tmp_path / "away")
    with pytest.raises(ValueError, match=r"cannot load '.*base': it is not on this disk.* put it back as it was"):
        scores(policy, "reference")
    (tmp_path / "away").rename(path)
    assert torch.equal(scores(policy, "reference"), scores(policy))


def test_another_kind_of_model_is_named(load, tmp_path):
    from transformers import Qwen2Config

    Qwen2Config().save_pretrained(tmp_path / "qwen")
    with pytest.raises(ValueError, match=r"holds a 'qwen2' model, but model.family 'llava' needs 'llava'"):
        load(path=tmp_path / "qwen")


def test_a_processor_without_chat_template_or_images_is_named(load, folder, tmp_path):
    build_llava(tmp_path / "plain", template=None)
    with pytest.raises(ValueError, match=r"has no chat template.*chat_template.jinja"):
        load(path=tmp_path / "plain")
    blind = tmp_path / "blind"
    shutil.copytree(folder, blind)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (blind / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"blind"):
        load(path=blind)
