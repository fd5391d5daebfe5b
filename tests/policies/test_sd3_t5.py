"""SD3 with its third text encoder: a real T5 at tiny width and a T5 tokenizer, from prompt to exported pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign import randomness
from mmalign.builtin import builtin_path
from mmalign.config import LoraConfig, ModelConfig
from mmalign.policies.load import load_policy

PROMPTS = ["a large red circle on a white background", "a small blue square"]
LENGTH = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled pipeline with a T5 as wide as its transformer's text input."""
    from diffusers import StableDiffusion3Pipeline
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    base = builtin_path("builtin:sd3-tiny")
    pipe = StableDiffusion3Pipeline.from_pretrained(base, text_encoder_3=None, tokenizer_3=None)
    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in words)]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        width = pipe.transformer.config.joint_attention_dim
        config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        t5 = T5EncoderModel(config).eval()
    pipe.register_modules(text_encoder_3=t5, tokenizer_3=tokenizer)
    path = tmp_path_factory.mktemp("sd3-t5")
    pipe.save_pretrained(path)
    return path


def load(path: Path, *, lora: bool = False, **model: Any) -> Any:
    adapter = LoraConfig(rank=4, targets="all") if lora else None
    config = ModelConfig(family="sd3", path=str(path), max_sequence_length=LENGTH, lora=adapter, **model)
    return load_policy(config, device="cpu")


def stock(path: Path) -> Any:
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def render(pipe: Any, policy: Any) -> bytes:
    latents = randomness.normal(policy.latent_shape, 0, "sample", PROMPTS[0])[None]
    settings = {"guidance_scale": 3.0, "num_inference_steps": 4, "max_sequence_length": LENGTH}
    return pipe(PROMPTS[0], latents=latents, **settings).images[0].tobytes()


def sampled(policy: Any) -> bytes:
    return policy.sample(PROMPTS[:1], [0], guidance_scale=3.0, num_steps=4)[0].image.tobytes()


def test_prompts_are_encoded_as_by_the_stock_pipeline_also_after_a_release(folder: Path):
    policy, pipe = load(folder), stock(folder)
    with torch.no_grad():
        embeds, _, pooled, _ = pipe.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=LENGTH
        )
    for _ in range(2):
        for index, record in enumerate(policy.encode_prompts(PROMPTS)):
            torch.testing.assert_close(record["embeds"], embeds[index], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(record["pooled"], pooled[index], rtol=1e-5, atol=1e-6)
        assert "text_encoder_3" in policy.release_encoders()
    first, second = embeds[:, -LENGTH:]
    assert float(first.abs().max()) > 0
    assert not torch.allclose(first, second), "T5 reads the prompt"


def test_without_t5_its_tokens_are_zeros_under_another_key(folder: Path):
    policy, without = load(folder), load(folder, without=["text_encoder_3", "tokenizer_3"])
    embeds = without.encode_prompts(PROMPTS)[0]["embeds"]
    assert not bool(embeds[-LENGTH:].any())
    torch.testing.assert_close(policy.encode_prompts(PROMPTS)[0]["embeds"][:-LENGTH], embeds[:-LENGTH])
    assert policy.encode_key("prompt") != without.encode_key("prompt")


def test_t5_reaches_the_score_and_stays_frozen(folder: Path, requests_for: Any):
    policy, without = load(folder, lora=True), load(folder, lora=True, without=["text_encoder_3", "tokenizer_3"])
    with torch.no_grad():
        scores = [p.score(requests_for(p, 4)).value_R for p in (policy, without)]
    assert float((scores[0] - scores[1]).abs().max()) > 1e-5
    policy.score(requests_for(policy, 2)).value_R.sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in policy.text_encoders()["text_encoder_3"].parameters())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_result_renders_the_same_in_the_stock_pipeline(folder: Path, tmp_path: Path, lora: bool):
    policy = load(folder, lora=lora)
    base = sampled(policy)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.add_((0.05 if lora else 0.01) * torch.randn(parameter.shape, generator=generator))
    tuned = sampled(policy)
    policy.export(tmp_path)
    pipe = stock(folder if lora else tmp_path)
    if lora:
        pipe.load_lora_weights(tmp_path)
    assert type(pipe.text_encoder_3).__name__ == "T5EncoderModel"
    assert render(pipe, policy) == tuned != base
