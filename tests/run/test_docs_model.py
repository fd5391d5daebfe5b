"""The families, the loss and the method that the guides show: they run, score as the stock classes do, and export."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import mmalign
from mmalign.builtin import builtin_path
from mmalign.config import load_config
from mmalign.data.load import load_rows
from mmalign.policies.load import load_policy
from mmalign.policies.tokens import TokenContext, TokenTarget
from mmalign.registry import resolve
from mmalign.run.preflight import probe_rollout
from mmalign.types import DrawKey, Request

DOCS = Path(__file__).resolve().parents[2] / "docs"
PROMPT = "a large red circle on a white background"
SHORT = {"train": {"steps": 1, "batch_size": 2, "learning_rate": 1e-3}, "run": {"log_every": 1, "tracker": "none"}}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(autouse=True)
def _files_of_the_guides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with the files that the pages show under their names."""
    for page in ("your_own_model.md", "how_a_method_and_a_model_meet.md"):
        for block in blocks(page, "python"):
            name = re.match(r"# (\w+\.py)\n", block)
            assert name is not None, block
            (tmp_path / name[1]).write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def shown(page: str, key: str) -> dict[str, Any]:
    """The YAML block of a page that names `key`, made short and small."""
    (tree,) = [yaml.safe_load(block) for block in blocks(page, "yaml") if key in block]
    tree = {**SHORT, "data": {"cache": False}, "output_dir": "run", **tree}
    tree["train"] = {**SHORT["train"], **tree.get("train", {})}
    return tree


def save_flow_pipeline(folder: str) -> Any:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTokenizer, UMT5Config, UMT5EncoderModel

    base = builtin_path("builtin:sdxl-tiny")
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    pipe = AuraFlowPipeline(
        tokenizer,
        UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)),
        AutoencoderKL.from_pretrained(base, subfolder="vae"),
        transformer,
        FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


def test_flow_family_of_the_guide():
    stock = save_flow_pipeline("base")
    tree = shown("your_own_model.md", "aura_flow.py")
    tree["model"] |= {"path": "base", "dtype": "fp32"}
    tree["data"] |= {"path": "builtin:synthetic", "format": "synthetic", "options": {"num_pairs": 2}}
    result = mmalign.train(tree)  # its own start checks ln 2 and that gradients arrive
    assert result.summary["status"] == "finished"
    stock.load_lora_weights(result.folder / "final")
    stock.unload_lora_weights()

    policy = load_policy(load_config(tree).config.model, device="cpu")
    keys = [DrawKey(0, "row", 0), DrawKey(0, "row", 1)]
    contexts = policy.encode_prompts([PROMPT] * 2)
    plan = {"keys": keys, "first_keys": keys, "guidance_scale": 2.0}
    steps = policy.rollout_steps(kernel="flow_sde", level=0.7, num_steps=4)
    trajectory = policy.rollout(contexts, steps=steps, index_BS=torch.tensor([[0, 2]] * 2), **plan)
    assert probe_rollout(policy, trajectory, dtype="fp32")
    steps = policy.rollout_steps(kernel="ode", level=0.0, num_steps=4)
    trajectory = policy.rollout(contexts, steps=steps, index_BS=torch.zeros(2, 0, dtype=torch.int64), **plan)
    drawn = stock(
        [PROMPT] * 2,
        latents=policy.noise(policy.latent_shape, "rollout start", keys),
        height=policy.resolution,
        width=policy.resolution,
        guidance_scale=2.0,
        num_inference_steps=4,
        output_type="latent",
        return_dict=False,
    )[0]
    assert torch.allclose(trajectory.latents, drawn, atol=2e-4)
    assert not torch.allclose(trajectory.latents, policy.noise(policy.latent_shape, "rollout start", keys), atol=0.1)


def save_language_model(folder: str) -> tuple[Any, Any]:
    from transformers import (
        AutoProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        VipLlavaConfig,
        VipLlavaForConditionalGeneration,
    )

    processor = AutoProcessor.from_pretrained(builtin_path("builtin:llava-tiny"))
    vision = CLIPVisionConfig(
        image_size=48,
        patch_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    torch.manual_seed(0)
    model = VipLlavaForConditionalGeneration(
        VipLlavaConfig(
            vision_config=vision, text_config=text, image_token_index=image_token, vision_feature_layer=[-1, -2]
        )
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval(), processor


@torch.no_grad()
def test_language_family_of_the_guide():
    stock, processor = save_language_model("base")
    tree = shown("your_own_model.md", "vip_llava.py")
    tree["model"] |= {"path": "base", "dtype": "fp32", "lora": {**tree["model"]["lora"], "rank": 2, "alpha": 2}}
    tree["data"] |= {"path": "builtin:synthetic_answers", "format": "synthetic_answers", "options": {"num_pairs": 2}}
    config = load_config(tree).config
    policy = load_policy(config.model, data=config.data, device="cpu")
    rows = load_rows(config.data, seed=0).rows
    requests, expected = [], []
    for row in rows:
        images = [ref.open() for ref in row.images]
        features = tuple(record["features"] for record in policy.encode_images(images))
        for side in ("chosen", "rejected"):
            ids_P, ids_T = policy.tokenize(row, side)
            names = tuple(ref.digest() for ref in row.images)
            requests.append(Request(TokenContext(ids_P, features, names), TokenTarget(ids_T), ()))
            pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
            logits_PV = stock(input_ids=torch.cat([ids_P, ids_T])[None], pixel_values=pixels).logits[0]
            logp_TV = torch.log_softmax(logits_PV[len(ids_P) - 1 : -1], dim=-1)
            expected.append(logp_TV.gather(1, ids_T[:, None]).sum())
    assert torch.allclose(policy.score(requests).value_R, torch.stack(expected), atol=1e-4)

    with torch.enable_grad():
        result = mmalign.train(tree)  # its own start checks 3 ln 2 and that gradients arrive
    assert result.summary["status"] == "finished"
    stock.load_adapter(str(result.folder / "final"))


def test_loss_of_the_guide():
    tree = shown("how_a_method_and_a_model_meet.md", "hinge.py")
    tree |= {"model": {"family": "sdxl", "path": "builtin:sdxl-tiny"}, "data": {"path": "unused"}}
    method = resolve("method", "preference")(**load_config(tree).config.method.options())
    assert method.golden_loss == 1.0
    loss = resolve("loss", "./hinge.py:hinge")
    chosen_B = torch.tensor([0.0, 1.0, -1.0])
    assert loss(chosen_B, torch.zeros(3), beta=2.0).tolist() == [1.0, 0.0, 3.0]


def test_method_of_the_guide():
    tree = shown("how_a_method_and_a_model_meet.md", "prompt_contrast.py")
    tree["model"] = {"family": "sdxl", "path": "builtin:sdxl-tiny", "lora": {"rank": 2}}
    tree["data"] |= {"path": "builtin:synthetic", "format": "synthetic", "options": {"num_pairs": 2}}
    tree["train"]["batch_size"] = 2
    result = mmalign.train(tree)
    assert result.summary["status"] == "finished"

    method = resolve("method", tree["method"]["name"])(beta=1.0)
    batch: Any = SimpleNamespace(context=["a", "b"], chosen=["A", "B"], keys=[[], []])
    asked = [(request.context, request.target) for request in method.requests(batch)]
    assert asked == [("a", "A"), ("b", "B"), ("b", "A"), ("a", "B")]
    score: Any = SimpleNamespace(value_R=torch.tensor([2.0, 0.0, 0.0, 0.0]))
    part = method.loss(batch, score, torch.zeros(4))
    assert part.loss_B.tolist() == pytest.approx([math.log1p(math.exp(-2)), math.log(2)])
