"""Train assets/sd15-tiny: a real StableDiffusionPipeline at tiny width.

python assets/build/vae.py && python assets/build/sd15.py
"""

from __future__ import annotations

import common
import pipelines
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from sdxl import TEXT_WIDTH, text_config
from transformers import CLIPTextModel


class Sd15Tiny:
    """The SD 1.5 family: one encoder, its last hidden state, no added conditioning."""

    name = "sd15-tiny"
    pipeline_class = StableDiffusionPipeline
    seed = 41
    steps = 5000

    def components(self, tokenizer) -> dict[str, torch.nn.Module]:
        unet = UNet2DConditionModel(
            sample_size=common.SIZE_PX // 8,
            block_out_channels=(32, 56),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=(2, 4),
            cross_attention_dim=TEXT_WIDTH,
            norm_num_groups=8,
        )
        return {"unet": unet, "text_encoder": CLIPTextModel(text_config(tokenizer))}

    def condition(self, modules, ids_BT: torch.Tensor, time_ids_B6: torch.Tensor) -> dict:
        return {"encoder_hidden_states": modules["text_encoder"](ids_BT).last_hidden_state}

    def pipeline(self, modules, vae, tokenizer, scheduler) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=vae,
            unet=modules["unet"],
            text_encoder=modules["text_encoder"],
            tokenizer=tokenizer,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


if __name__ == "__main__":
    pipelines.build(Sd15Tiny())
