"""The shipped tiny models: stock loading, size budgets, honest cards, and the traps that made earlier ones useless."""

from __future__ import annotations

import json
import logging
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from mmalign.synthetic import scenes
from mmalign.synthetic.render import render
from mmalign.synthetic.scenes import captions, sample_scenes
from mmalign.synthetic.scorer import score

logging.getLogger("xformers").setLevel(logging.ERROR)
torch = pytest.importorskip("torch")

ASSETS = Path(str(files("mmalign.assets")))
PIPELINES = {"sdxl-tiny": "StableDiffusionXLPipeline", "sd15-tiny": "StableDiffusionPipeline"}
RED_CIRCLE = "a large red circle on a white background"
BLUE_SQUARE = "a small blue square on a black background"


def card(name: str) -> dict:
    return json.loads((ASSETS / name / "card.json").read_text())


@pytest.fixture(scope="module", params=PIPELINES)
def pipe(request: pytest.FixtureRequest):
    import diffusers

    loaded = getattr(diffusers, PIPELINES[request.param]).from_pretrained(ASSETS / request.param)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def clip():
    open_clip = pytest.importorskip("open_clip")
    location = f"local-dir:{ASSETS / 'clip-tiny'}"
    model, _, preprocess = open_clip.create_model_and_transforms(location)
    return model.eval(), preprocess, open_clip.get_tokenizer(location)


@pytest.mark.parametrize("tier", scenes.TIERS)
@pytest.mark.parametrize("split", scenes.SPLITS)
def test_prompt_files_equal_the_specification(tier: scenes.Tier, split: scenes.Split) -> None:
    lines = (ASSETS / "prompts" / f"{tier}_{split}.txt").read_text().splitlines()
    assert tuple(lines) == captions(tier, split)


@pytest.mark.parametrize(
    ("name", "limit"),
    [("sdxl-tiny", 3_000_000), ("sd15-tiny", 3_000_000), ("clip-tiny", 1_500_000), ("aesthetic-tiny", 50_000)],
)
def test_sizes_cards_and_formats(name: str, limit: int) -> None:
    folder = ASSETS / name
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in paths) <= limit
    assert not [path for path in paths if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    facts = card(name)
    assert facts["name"] == name
    assert "preview" not in facts
    text = (folder / "README.md").read_text()
    assert facts["command"] in text
    assert str(facts["seed"]) in text


@pytest.mark.parametrize("name", PIPELINES)
def test_base_is_recognisable_and_imperfect(name: str) -> None:
    facts = card(name)
    heldout = facts["heldout"]["attributes"]
    share = heldout[f"guidance_{facts['guidance_scale']:g}"]["all_right"]
    assert 0.30 <= share <= 0.75
    assert share <= facts["vae_ceiling"]["attributes"]["all_right"] - 0.15
    assert heldout["guidance_1"]["all_right"] < share


def test_stock_pipeline_draws_what_its_card_says(pipe) -> None:
    facts = card("sdxl-tiny" if hasattr(pipe, "text_encoder_2") else "sd15-tiny")
    texts = list(captions("attributes", "train"))[::4]
    generator = torch.Generator().manual_seed(0)
    images = pipe(
        texts,
        guidance_scale=facts["guidance_scale"],
        num_inference_steps=10,
        generator=generator,
        output_type="np",
    ).images
    assert images.shape == (len(texts), 64, 64, 3)
    pixels = (images * 255).round().astype(np.uint8)
    asked = score(pixels, texts)
    swapped = score(pixels, [*texts[7:], *texts[:7]])
    assert asked.accuracy("background") > 0.9
    assert asked.graded.mean() > swapped.graded.mean() + 0.2
    # One clipped latent value would turn every picture into mush.
    assert pipe.scheduler.config.clip_sample is False
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.scheduler.config.rescale_betas_zero_snr is True
    assert pipe.scheduler.config.timestep_spacing == "trailing"


def test_prompts_have_distinct_embeddings(pipe) -> None:
    """CLIPTextConfig's default eos id pools every prompt alike."""
    with torch.no_grad():
        embeds = pipe.encode_prompt(
            [RED_CIRCLE, BLUE_SQUARE, ""], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    for tensor in (embeds[0], embeds[2]) if hasattr(pipe, "text_encoder_2") else (embeds[0],):
        assert (tensor[0] - tensor[1]).abs().mean() > 0.05
        assert (tensor[0] - tensor[2]).abs().mean() > 0.05
    tokenizer = pipe.tokenizer
    assert pipe.text_encoder.config.eos_token_id == tokenizer.eos_token_id
    for tier in scenes.TIERS:
        for text in captions(tier, "heldout"):
            ids = tokenizer(text).input_ids
            assert len(ids) == len(text.split()) + 2
            assert len(ids) <= tokenizer.model_max_length


def test_components_share_one_dtype_and_the_file_is_fp16(pipe) -> None:
    from safetensors import safe_open

    folder = ASSETS / ("sdxl-tiny" if hasattr(pipe, "text_encoder_2") else "sd15-tiny")
    modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    assert {p.dtype for m in modules for p in m.parameters()} == {torch.float32}
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            kinds = {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
        assert "F16" in kinds
        assert kinds <= {"F16", "I64"}


def test_latents_are_normalised_and_decode_back(pipe) -> None:
    texts = list(captions("attributes", "heldout"))
    images = render(sample_scenes(texts, np.random.default_rng(0)), 64)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latent = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        decoded = pipe.vae.decode(latent / pipe.vae.config.scaling_factor).sample
    assert latent.shape == (len(texts), 4, 8, 8)
    assert latent.mean(dim=(0, 2, 3)).abs().max() < 0.35
    assert 0.7 < latent.std(dim=(0, 2, 3)).min() <= latent.std(dim=(0, 2, 3)).max() < 1.4
    back = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert score(back, texts).all_right.mean() >= 0.85


def test_clip_finds_its_caption_among_one_word_neighbours(clip) -> None:
    from PIL import Image

    model, preprocess, tokenizer = clip
    texts = list(captions("attributes", "heldout"))
    images = render(sample_scenes(texts, np.random.default_rng(8)), 64)
    rng = np.random.default_rng(9)
    everything = [t for split in scenes.SPLITS for t in captions("attributes", split)]
    right = []
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.fromarray(i)) for i in images])
        image_features = model.encode_image(pixels, normalize=True)
        text_features = dict(zip(everything, model.encode_text(tokenizer(everything), normalize=True), strict=True))
    for text, feature in zip(texts, image_features, strict=True):
        words = text.split()
        near = [t for t in everything if sum(a != b for a, b in zip(t.split(), words, strict=True)) == 1]
        rivals = [near[i] for i in rng.choice(len(near), 8, replace=False)]
        candidates = torch.stack([text_features[t] for t in (text, *rivals)])
        right.append(int((candidates @ feature).argmax()) == 0)
    assert np.mean(right) >= 0.75  # 64 images: the card's figure, from 256, less two standard errors
    assert card("clip-tiny")["recall_at_1_heldout"] >= 0.8


def test_aesthetic_head_reads_height(clip) -> None:
    from PIL import Image
    from safetensors.torch import load_file

    model, preprocess, _ = clip
    state = load_file(ASSETS / "aesthetic-tiny" / "model.safetensors")
    assert sorted(state) == sorted(f"layers.{i}.{k}" for i in (0, 2, 4, 6, 7) for k in ("weight", "bias"))
    drawn = sample_scenes(list(captions("attributes", "heldout")) * 3, np.random.default_rng(2))
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.fromarray(i)) for i in render(drawn, 64)])
        value = model.encode_image(pixels, normalize=True)
        for i in (0, 2, 4, 6, 7):
            value = value @ state[f"layers.{i}.weight"].float().T + state[f"layers.{i}.bias"].float()
    height = np.array([10 * (1 - s.objects[0].y) for s in drawn])
    residual = ((value[:, 0].numpy() - height) ** 2).mean()
    assert 1 - residual / height.var() > 0.7
    assert card("aesthetic-tiny")["r2_heldout"] > 0.75
