"""What the benchmarks run on: SDXL pipelines of the real classes with random weights, and FLOP counts of SDXL itself.

Nothing is downloaded. A pipeline is built in a temporary folder from the bundled tiny SDXL, whose tokenizers and file
layout it keeps, and vanishes with that folder. FLOPs are counted by `FlopCounterMode`, 2 per multiply-add.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmalign.attention import quiet_xformers
from mmalign.builtin import builtin_path
from mmalign.run.session import quiet_libraries

# Published configurations of stabilityai/stable-diffusion-xl-base-1.0, where they differ from the classes' defaults.
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "norm_num_groups": 32,
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
}
CLIP_BIGG: dict[str, Any] = {
    **CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
NUM_TOKENS = 77
LORA_RANK = 8


@dataclasses.dataclass(frozen=True)
class Size:
    """A pipeline and how it is run.

    Args:
        unet, vae, text, text_2: what differs from the bundled tiny SDXL; None keeps a part and its trained weights.
        resolution: side of the training images in pixels.
        batch_size: pairs per step.
        dtype: compute precision (`model.dtype`).
        num_pairs: alternations of the two procedures.
        steps_per_block: optimizer steps per block.
        tracker: `run.tracker` of our loop.
    """

    name: str
    unet: dict[str, Any] | None = None
    vae: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    text_2: dict[str, Any] | None = None
    resolution: int = 64
    batch_size: int = 2
    dtype: str = "fp32"
    num_pairs: int = 15
    steps_per_block: int = 1
    tracker: str = "tensorboard"


SIZES = {
    # Seconds in all: shows that the benchmark runs, its ratios mean nothing.
    "quick": Size("quick", num_pairs=2, tracker="none"),
    # A step of about a second on two cores, so that the model and not Python is what takes the time. The widths are
    # chosen for shares of UNet, VAE and text in the FLOPs that resemble SDXL's.
    "small": Size(
        "small",
        unet={"block_out_channels": (192, 384), "attention_head_dim": (6, 12), "norm_num_groups": 32},
        vae={"block_out_channels": (32, 64, 128, 128), "layers_per_block": 2, "norm_num_groups": 32},
        text={"num_hidden_layers": 12, "intermediate_size": 512},
        text_2={"num_hidden_layers": 12, "intermediate_size": 512},
        resolution=128,
    ),
    # The real architecture, for a GPU.
    "sdxl": Size(
        "sdxl",
        unet=SDXL_UNET,
        vae=SDXL_VAE,
        text=CLIP_L,
        text_2=CLIP_BIGG,
        resolution=1024,
        dtype="bf16",
    ),
}


def make_pipeline(size: Size, folder: Path) -> Path:
    """Write the pipeline of `size` below `folder`; returns its path."""
    quiet_xformers()
    quiet_libraries()
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    pipe = StableDiffusionXLPipeline.from_pretrained(builtin_path("builtin:sdxl-tiny"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sample_size = size.resolution // 8
        if size.unet is not None:
            pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, "sample_size": sample_size, **size.unet})
        if size.vae is not None:
            pipe.vae = AutoencoderKL.from_config({**pipe.vae.config, **size.vae})
        for role, changes, kind in (
            ("text_encoder", size.text, CLIPTextModel),
            ("text_encoder_2", size.text_2, CLIPTextModelWithProjection),
        ):
            if changes is not None:
                config = type(getattr(pipe, role).config)(**{**getattr(pipe, role).config.to_dict(), **changes})
                setattr(pipe, role, kind(config))
                tokenizer = getattr(pipe, role.replace("text_encoder", "tokenizer"))
                tokenizer.model_max_length = config.max_position_embeddings
    path = folder / f"sdxl-{size.name}"
    if size.dtype == "bf16":
        pipe.unet.to(torch.bfloat16)  # random weights: half the file will do
    pipe.save_pretrained(path)
    return path


def flops(function: Callable[[], Any]) -> int:
    """FLOPs of one call, backward passes included."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@dataclasses.dataclass(frozen=True)
class PairFlops:
    """FLOPs of one Diffusion-DPO pair: policy forward and backward and reference forward of two images (`unet`),
    encoding two images (`vae`) and one prompt (`text`)."""

    unet: float
    vae: float
    text: float

    @property
    def shares(self) -> str:
        total = self.unet + self.vae + self.text
        return " : ".join(f"{100 * part / total:.1f}" for part in (self.unet, self.vae, self.text)) + " %"

    @property
    def speedup(self) -> float:
        """What not encoding saves, if every FLOP took the same time."""
        return (self.unet + self.vae + self.text) / self.unet


def sdxl_pair_flops(resolution: int) -> dict[str, PairFlops]:
    """`lora` and `full`, counted on SDXL's real configuration on the meta device: shapes only, seconds, no memory.

    Without gradient checkpointing; LoRA of rank 8 on the attention projections, as in the published scripts.
    """
    from peft import LoraConfig

    unet, reference, vae, text = sdxl_forward_flops(resolution)
    denoise = _denoiser(unet, resolution)
    found = {"full": flops(lambda: denoise().sum().backward())}
    unet.requires_grad_(False)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=targets))
    found["lora"] = flops(lambda: denoise().sum().backward())
    return {name: PairFlops(2.0 * (policy + reference), 2.0 * vae, float(text)) for name, policy in found.items()}


def sdxl_forward_flops(resolution: int) -> tuple[Any, int, int, int]:
    """SDXL's UNet on the meta device, and the FLOPs of one UNet forward, one image encoded and one prompt encoded."""
    quiet_xformers()
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"), torch.no_grad():
        unet, vae = UNet2DConditionModel(**SDXL_UNET), AutoencoderKL(**SDXL_VAE)
        encoders = [CLIPTextModel(CLIPTextConfig(**CLIP_L)), CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_BIGG))]
        pixels, tokens = torch.empty(1, 3, resolution, resolution), torch.zeros(1, NUM_TOKENS, dtype=torch.long)
        denoise = _denoiser(unet, resolution)
        encode = flops(lambda: vae.encode(pixels))
        text = sum(flops(lambda encoder=encoder: encoder(tokens)) for encoder in encoders)
        return unet, flops(denoise), encode, text


def _denoiser(unet: Any, resolution: int) -> Callable[[], torch.Tensor]:
    side = resolution // 8
    with torch.device("meta"):
        inputs = (torch.empty(1, 4, side, side), torch.zeros(1), torch.empty(1, NUM_TOKENS, 2048))
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
    return lambda: unet(*inputs, added_cond_kwargs=added, return_dict=False)[0]
