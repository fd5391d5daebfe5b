"""The flow policy on the tiny SD3 pipeline: time densities, scores, joint attention, and results in stock diffusers."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from mmalign.builtin import builtin_path
from mmalign.config import ConfigError, DataConfig, LoraConfig, ModelConfig, load_config
from mmalign.diffusion.schedule import FlowSchedule, dynamic_mu, squared_error
from mmalign.policies.load import load_policy
from mmalign.policies.views import ADAPTER

PROMPT = "a large red circle on a white background"


def load(*, lora: dict[str, Any] | None = None, **model: Any) -> Any:
    adapter = LoraConfig(**lora) if lora else None
    return load_policy(
        ModelConfig(family="sd3", path="builtin:sd3-tiny", max_sequence_length=8, lora=adapter, **model), device="cpu"
    )


@pytest.fixture(scope="module")
def policy() -> Any:
    return load()


def nudge(policy: Any, size: float = 0.01) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


# --- schedule ---------------------------------------------------------------------------------------------------------


def test_sigma_convention_and_velocity_identities():
    schedule = FlowSchedule()
    x0, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    sigma_N = torch.tensor([0.0, 0.3, 1.0])
    x, v = schedule.noised(x0, noise, sigma_N), schedule.target(x0, noise, sigma_N)
    assert torch.equal(x[0], x0[0])  # 0 is data
    assert torch.equal(x[2], noise[2])  # 1 is noise
    sigma = sigma_N.view(3, 1, 1, 1)
    torch.testing.assert_close(x - sigma * v, x0)
    torch.testing.assert_close(x + (1 - sigma) * v, noise)
    assert torch.equal(schedule.network_time(sigma_N), sigma_N * 1000)


def test_density_is_logit_normal_then_shifted():
    u = [(i + 0.5) / 4000 for i in range(4000)]
    plain = np.array([FlowSchedule(shift=1.0).time(x) for x in u])
    logits = np.log(plain / (1 - plain))
    assert abs(logits.mean()) < 1e-3
    assert abs(logits.std() - 1) < 2e-3
    shifted = np.array([FlowSchedule(shift=3.0).time(x) for x in u])
    np.testing.assert_allclose(shifted, 3 * plain / (1 + 2 * plain), rtol=1e-12)
    assert FlowSchedule(density="uniform").time(0.25) == 0.25
    assert FlowSchedule().time(0.0) > 0  # never exactly data or noise, where the inverse normal is infinite
    assert FlowSchedule().time(1 - 1e-16) < 1
    assert FlowSchedule().time(0.75) == pytest.approx(1 / (1 + math.exp(-NormalDist().inv_cdf(0.75))))


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shift_is_the_pipelines(kind: str):
    """μ by the pipeline's own function, and what the stock scheduler makes of it, at three resolutions."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    for num_tokens in (256, 1024, 4096):
        mu = calculate_shift(num_tokens, 256, 4096, 0.5, 1.15)
        assert dynamic_mu(scheduler.config, num_tokens) == pytest.approx(mu, rel=1e-12)
        schedule = FlowSchedule.from_scheduler(scheduler, num_tokens=num_tokens, density="uniform")
        for sigma in (0.1, 0.5, 0.9):
            shifted = scheduler.time_shift(mu, 1.0, torch.tensor(sigma, dtype=torch.float64))
            assert schedule.time(sigma) == pytest.approx(float(shifted), rel=1e-6), (num_tokens, sigma)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_dynamically_shifted_pipeline_trains_and_samples_on_its_own_sigmas(tmp_path: Path, kind: str):
    shutil.copytree(builtin_path("builtin:sd3-tiny"), tmp_path / "sd3")
    file = tmp_path / "sd3" / "scheduler" / "scheduler_config.json"
    dynamic = {"use_dynamic_shifting": True, "time_shift_type": kind}
    file.write_text(json.dumps(json.loads(file.read_text()) | dynamic))
    model = ModelConfig(family="sd3", path=str(tmp_path / "sd3"), max_sequence_length=8)
    policy = load_policy(model, device="cpu", train=False)
    pipe = stock(tmp_path / "sd3")
    render(pipe, policy)
    steps = policy.rollout_steps(kernel="flow_sde", level=0.7, num_steps=4)
    torch.testing.assert_close(steps.time_S, pipe.scheduler.timesteps, rtol=1e-6, atol=0)
    ode = policy.rollout_steps(kernel="ode", level=0.0, num_steps=4)
    torch.testing.assert_close(ode.B_S, pipe.scheduler.sigmas.diff(), rtol=1e-5, atol=1e-7)
    mu = dynamic_mu(pipe.scheduler.config, policy.num_tokens)
    assert policy.schedule.shift == pytest.approx(mu if kind == "linear" else math.exp(mu))


def test_a_diffusion_scheduler_is_refused():
    from diffusers import DDIMScheduler

    with pytest.raises(ValueError, match="no flow-matching scheduler"):
        FlowSchedule.from_scheduler(DDIMScheduler(), num_tokens=16)
    with pytest.raises(ValueError, match="must be positive"):
        FlowSchedule(shift=0.0)


def test_density_and_shift_come_from_the_config():
    policy = load(timestep_density="uniform", timestep_shift=2.0)
    assert policy.schedule == FlowSchedule("uniform", 2.0)


# --- score ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_score_is_the_velocity_error_of_the_public_transformer(policy, requests_for, guidance_scale):
    """Independent of `score`: the transformer called as diffusers does, noise and σ from the draw keys."""
    from mmalign import randomness

    requests = [replace(request, guidance_scale=guidance_scale) for request in requests_for(policy, 4)]
    with torch.no_grad():
        score = policy.score(requests)
        for request, value in zip(requests, score.value_R, strict=True):
            (key,) = request.keys
            sigma = policy.schedule.time(randomness.stratified_uniform(key.seed, "t", key.row_id, key.draw))
            shape = tuple(request.target["mean"].shape)
            posterior = randomness.normal(shape, key.seed, "vae", key.row_id, key.draw)
            x0 = request.target["mean"] + torch.exp(0.5 * request.target["logvar"]) * posterior
            x0 = (x0 - policy.pipe.vae.config.shift_factor) * policy.pipe.vae.config.scaling_factor
            noise = randomness.normal(shape, key.seed, "noise", key.row_id, key.draw)
            out, negative = (
                policy.pipe.transformer(
                    hidden_states=((1 - sigma) * x0 + sigma * noise)[None],
                    timestep=torch.tensor([1000 * sigma]),
                    encoder_hidden_states=context["embeds"][None],
                    pooled_projections=context["pooled"][None],
                ).sample
                for context in (request.context, policy.encode_prompts([""])[0])
            )
            out = negative + guidance_scale * (out - negative)
            assert float(-0.5 * squared_error(out, (noise - x0)[None])) == pytest.approx(float(value), rel=1e-4)
    assert score.kind == "surrogate"


def test_text_has_the_asked_number_of_t5_tokens(policy):
    clip = policy.pipe.tokenizer.model_max_length
    assert policy.encode_prompts([PROMPT])[0]["embeds"].shape[0] == clip + 8
    longer = load_policy(ModelConfig(family="sd3", path="builtin:sd3-tiny"), device="cpu", train=False)
    assert longer.encode_prompts([PROMPT])[0]["embeds"].shape[0] == clip + 256
    assert longer.encode_key("prompt") != policy.encode_key("prompt")


def test_a_prompt_is_cut_where_not_even_t5_reads_its_end(policy):
    from transformers import T5Config, T5EncoderModel

    t5 = T5EncoderModel(T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    words = {count: " ".join(["red"] * count) for count in (6, 22, 23, 30, 31)}  # and two special tokens
    clip = policy.pipe.tokenizer.model_max_length
    assert clip == 24
    assert policy.cut_prompts(words.values()) == {words[count] for count in (23, 30, 31)}
    for limit, cut in ((8, (23, 30, 31)), (32, (31,)), (None, ())):
        model = ModelConfig(family="sd3", path="builtin:sd3-tiny", max_sequence_length=limit)
        with_t5 = load_policy(model, device="cpu", train=False)
        with_t5.pipe.tokenizer_3, with_t5.pipe.text_encoder_3 = policy.pipe.tokenizer, t5
        assert with_t5.cut_prompts(words.values()) == {words[count] for count in cut}
    assert policy.cut_prompts([]) == set()


@pytest.mark.parametrize(
    ("family", "resolution", "message"),
    [
        ("sdxl", 68, "must be a multiple of 8"),
        ("sd3", 72, "must be a multiple of 16"),
        ("sd3", 80, "must be at most 64"),
        ("sdxl", 72, None),
        ("sd3", 48, None),
    ],
)
def test_a_resolution_that_cannot_be_trained_is_refused_at_loading(family: str, resolution: int, message: str | None):
    model = ModelConfig(family=family, path=f"builtin:{family}-tiny")
    data = DataConfig(path="unused", resolution=resolution)
    if message is None:
        assert load_policy(model, data=data, device="cpu", train=False).resolution == resolution
        return
    with pytest.raises(ValueError, match=rf"data\.resolution = {resolution}: {message}"):
        load_policy(model, data=data, device="cpu", train=False)


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_lora_reaches_both_streams_and_reference_is_the_base(requests_for, targets):
    policy = load(lora={"rank": 4, "targets": targets}, gradient_checkpointing=True)
    names = [name for name, _ in policy.trainable()]
    assert any(".to_q." in name for name in names)
    assert any(".add_q_proj." in name for name in names)
    assert not any("pos_embed" in name or "proj_out" in name for name in names)
    requests = requests_for(policy, 2)
    with torch.no_grad():
        base = policy.score(requests).value_R
    nudge(policy, 0.1)
    policy.score(requests).value_R.sum().backward()
    zero = [name for name, p in policy.trainable() if p.grad is None or not bool(p.grad.abs().any())]
    # The last block has no text output: what only feeds it learns nothing.
    assert all("transformer_blocks.5." in name or "context" in name for name in zero), zero
    with torch.no_grad(), policy.view("reference"):
        assert torch.equal(policy.score(requests).value_R, base)


# --- results ----------------------------------------------------------------------------------------------------------


def render(pipe: Any, policy: Any) -> bytes:
    from mmalign import randomness

    latents = randomness.normal(policy.latent_shape, 0, "sample", PROMPT)[None]
    image = pipe(PROMPT, latents=latents, guidance_scale=3.0, num_inference_steps=4, max_sequence_length=8).images[0]
    return image.tobytes()


def stock(path: Path) -> Any:
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(path, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_lora_result_loads_in_stock_diffusers_whole_and_bit_exact(tmp_path: Path):
    policy = load(lora={"rank": 4, "alpha": 8, "targets": "all"})
    base = policy.sample([PROMPT], [0], guidance_scale=3.0, num_steps=4)[0].image.tobytes()
    nudge(policy, 0.05)
    tuned = policy.sample([PROMPT], [0], guidance_scale=3.0, num_steps=4)[0].image.tobytes()
    policy.export(tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        saved = set(file.keys())
    pipe = stock(builtin_path("builtin:sd3-tiny"))
    pipe.load_lora_weights(tmp_path)
    loaded = [name for name, _ in pipe.transformer.named_parameters() if ".lora_" in name]
    assert len(loaded) == len(saved) == len(policy.trainable())
    assert {name.split(".")[-2] for name, _ in policy.trainable()} == {ADAPTER}
    assert render(pipe, policy) == tuned != base
    pipe.disable_lora()
    assert render(pipe, policy) == base


def test_full_result_loads_in_stock_diffusers_and_renders_the_same(tmp_path: Path):
    policy = load()
    base = policy.sample([PROMPT], [0], guidance_scale=3.0, num_steps=4)[0].image.tobytes()
    nudge(policy)
    tuned = policy.sample([PROMPT], [0], guidance_scale=3.0, num_steps=4)[0].image.tobytes()
    policy.export(tmp_path)
    assert render(stock(tmp_path), policy) == tuned != base


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "section", "key"),
    [
        ("sdxl", "model", "timestep_shift"),
        ("sdxl", "data", "max_length"),
        ("sd3", "data", "max_length"),
        ("sd3", "evaluate", "max_new_tokens"),
        ("llava", "model", "timestep_shift"),
        ("llava", "data", "resolution"),
        ("llava", "method", "guidance_scale"),
    ],
)
def test_a_key_the_family_does_not_read_is_an_error(family: str, section: str, key: str):
    config: dict[str, Any] = {
        "model": {"family": family, "path": "x"},
        "method": {"name": "preference", "losses": [{"name": "dpo", "beta": 1.0}]},
        "data": {"path": "x"},
        "train": {"steps": 1, "batch_size": 1, "learning_rate": 1e-4},
        "evaluate": {},
        "output_dir": "x",
    }
    load_config(config)
    config[section] = {**config[section], key: 16, **({"experimental": True} if section == "method" else {})}
    with pytest.raises(ConfigError, match=rf"{section}\.{key} = 16.* would do nothing"):
        load_config(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 0.5}, "must be at least 1"),
        ({"guidance_scale": 3.0}, "needs experimental: true"),
        ({"experimental": True}, "nothing else does"),
        ({"guidance_scale": "inf", "experimental": True}, "and finite"),
        ({"guidance_scale": 3, "experimental": True}, "nothing to be guided from"),
    ],
)
def test_scoring_under_guidance_is_asked_for_by_name(options: dict[str, Any], message: str):
    overrides = [f"method.{key}={value}" for key, value in options.items()]
    with pytest.raises(ConfigError, match=message):
        load_config("synthetic/sd3_flow_dpo_full.yaml", [*overrides, "data.prompt_dropout=0.1"])
