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
PIPELINES = {
    "sdxl-tiny": "StableDiffusionXLPipeline",
    "sd15-tiny": "StableDiffusionPipeline",
    "sd3-tiny": "StableDiffusion3Pipeline",
}
# What a stock pipeline has to be told about a folder without T5: that there is none, and how many zero tokens it means.
LOADING = {"sd3-tiny": {"text_encoder_3": None, "tokenizer_3": None}}
CALLING = {"sd3-tiny": {"max_sequence_length": 8}}
RED_CIRCLE = "a large red circle on a white background"
BLUE_SQUARE = "a small blue square on a black background"


def card(name: str) -> dict:
    return json.loads((ASSETS / name / "card.json").read_text())


def load(name: str):
    import diffusers

    loaded = getattr(diffusers, PIPELINES[name]).from_pretrained(ASSETS / name, **LOADING.get(name, {}))
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module", params=PIPELINES)
def name_and_pipe(request: pytest.FixtureRequest):
    return request.param, load(request.param)


@pytest.fixture(scope="module")
def pipe(name_and_pipe):
    return name_and_pipe[1]


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
    [*((name, 3_000_000) for name in PIPELINES), ("clip-tiny", 1_500_000), ("aesthetic-tiny", 50_000)],
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


def test_stock_pipeline_draws_what_its_card_says(name_and_pipe) -> None:
    name, pipe = name_and_pipe
    facts = card(name)
    texts = list(captions("attributes", "train"))[::4]
    generator = torch.Generator().manual_seed(0)
    images = pipe(
        texts,
        guidance_scale=facts["guidance_scale"],
        num_inference_steps=10,
        generator=generator,
        output_type="np",
        **CALLING.get(name, {}),
    ).images
    assert images.shape == (len(texts), 64, 64, 3)
    pixels = (images * 255).round().astype(np.uint8)
    asked = score(pixels, texts)
    swapped = score(pixels, [*texts[7:], *texts[:7]])
    assert asked.accuracy("background") > 0.9
    assert asked.graded.mean() > swapped.graded.mean() + 0.2


@pytest.mark.parametrize("name", ["sdxl-tiny", "sd15-tiny"])
def test_diffusion_scheduler_clips_nothing_and_starts_from_pure_noise(name: str) -> None:
    config = json.loads((ASSETS / name / "scheduler" / "scheduler_config.json").read_text())
    # One clipped latent value would turn every picture into mush.
    assert config["clip_sample"] is False
    assert config["prediction_type"] == "v_prediction"
    assert config["rescale_betas_zero_snr"] is True
    assert config["timestep_spacing"] == "trailing"


def test_flow_denoiser_predicts_noise_minus_latent_at_a_thousand_sigma() -> None:
    pipe = load("sd3-tiny")
    texts = list(captions("attributes", "train"))[::2]
    images = render(sample_scenes(texts, np.random.default_rng(4)), 64)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1

    def error(prompts: list[str], sigma: float, timestep: float, sign: float = 1.0) -> float:
        with torch.no_grad():
            states, _, pooled, _ = pipe.encode_prompt(
                prompts, None, None, device="cpu", do_classifier_free_guidance=False, **CALLING["sd3-tiny"]
            )
            latent = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
            noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(5))
            velocity = pipe.transformer(
                hidden_states=(1 - sigma) * latent + sigma * noise,
                timestep=torch.full((len(prompts),), timestep),
                encoder_hidden_states=states,
                pooled_projections=pooled,
            ).sample
        return float((velocity - sign * (noise - latent)).square().mean())

    for sigma in (0.3, 0.5, 0.7, 0.9):
        right = error(texts, sigma, 1000 * sigma)
        assert right < 0.7  # zero would give about 2: unit noise less a unit latent
        assert error(texts, sigma, 1000 * sigma, sign=-1.0) > 4 * right
        assert error(texts, sigma, sigma) > 1.2 * right
    # At high noise only the caption says what to draw.
    assert error([*texts[7:], *texts[:7]], 0.9, 900.0) > 1.2 * error(texts, 0.9, 900.0)


def test_flow_schedule_is_shifted_once_in_the_config() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(ASSETS / "sd3-tiny", subfolder="scheduler")
    assert scheduler.config.use_dynamic_shifting is False
    scheduler.set_timesteps(20)
    # diffusers applies a static shift twice, to its stored bounds and to the steps between; 1 leaves nothing to double.
    assert scheduler.config.shift == 1.0
    expected = torch.cat([torch.linspace(1.0, 0.001, 20), torch.zeros(1)])
    torch.testing.assert_close(scheduler.sigmas, expected)


@pytest.fixture(scope="module")
def objectives():
    from importlib.util import module_from_spec, spec_from_file_location

    source = Path(__file__).parents[2] / "assets" / "build" / "objectives.py"
    spec = spec_from_file_location("objectives", source)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_training_targets_are_those_of_the_stock_schedulers(objectives) -> None:
    generator = torch.Generator().manual_seed(1)
    latent, noise = torch.randn(2, 6, 4, 8, 8, generator=generator)
    diffusion = objectives.VPrediction()
    time = diffusion.draw(6, generator)
    noisy, target = diffusion.noised(latent, noise, time)
    torch.testing.assert_close(noisy, diffusion.scheduler().add_noise(latent, noise, time))
    torch.testing.assert_close(target, diffusion.scheduler().get_velocity(latent, noise, time))

    flow = objectives.RectifiedFlow(shift=3.0, logit_normal=True)
    scheduler = flow.scheduler()
    time = scheduler.timesteps[[0, 200, 400, 600, 800, 999]]
    noisy, target = flow.noised(latent, noise, time)
    torch.testing.assert_close(noisy, scheduler.scale_noise(latent, time, noise))
    # A perfect denoiser lands on the latent in one Euler step, whatever the noise level.
    torch.testing.assert_close(noisy - (time / 1000).view(-1, 1, 1, 1) * target, latent, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("logit_normal", [True, False])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_training_times_have_the_shifted_median(objectives, shift: float, logit_normal: bool) -> None:
    flow = objectives.RectifiedFlow(shift=shift, logit_normal=logit_normal)
    sigma = flow.draw(20_000, torch.Generator().manual_seed(2)) / 1000
    assert 0 < sigma.min() < sigma.max() <= 1
    assert float(sigma.median()) == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5), abs=0.01)


def test_prompts_have_distinct_embeddings(name_and_pipe) -> None:
    """CLIPTextConfig's default eos id pools every prompt alike."""
    name, pipe = name_and_pipe
    prompts = [RED_CIRCLE, BLUE_SQUARE, ""]
    others = {"prompt_2": None, "prompt_3": None} if name == "sd3-tiny" else {}
    with torch.no_grad():
        embeds = pipe.encode_prompt(
            prompts,
            **others,
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            **CALLING.get(name, {}),
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


def test_components_share_one_dtype_and_the_file_is_fp16(name_and_pipe) -> None:
    from safetensors import safe_open

    name, pipe = name_and_pipe
    folder = ASSETS / name
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
