"""Train assets/sdxl-tiny: a real StableDiffusionXLPipeline at tiny width.

python assets/build/vae.py && python assets/build/sdxl.py
"""

from __future__ import annotations

import common
import pipelines
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

TEXT_WIDTH = 64
TIME_WIDTH = 8


def text_config(tokenizer) -> CLIPTextConfig:
    # Without the tokenizer's ids the pooled embedding is read at id 49407, which never occurs: all prompts pool alike.
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=TEXT_WIDTH,
        max_position_embeddings=pipelines.CONTEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class SdxlTiny:
    """The SDXL family: two encoders, penultimate states concatenated, pooled projection of the second, time ids."""

    name = "sdxl-tiny"
    pipeline_class = StableDiffusionXLPipeline
    seed = 31
    steps = 5000

    def components(self, tokenizer) -> dict[str, torch.nn.Module]:
        unet = UNet2DConditionModel(
            sample_size=common.SIZE_PX // 8,
            block_out_channels=(32, 56),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=(2, 4),
            cross_attention_dim=2 * TEXT_WIDTH,
            norm_num_groups=8,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_WIDTH,
            projection_class_embeddings_input_dim=6 * TIME_WIDTH + TEXT_WIDTH,
        )
        return {
            "unet": unet,
            "text_encoder": CLIPTextModel(text_config(tokenizer)),
            "text_encoder_2": CLIPTextModelWithProjection(text_config(tokenizer)),
        }

    def condition(self, modules, ids_BT: torch.Tensor, time_ids_B6: torch.Tensor) -> dict:
        first = modules["text_encoder"](ids_BT, output_hidden_states=True)
        second = modules["text_encoder_2"](ids_BT, output_hidden_states=True)
        states_BTD = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        added = {"text_embeds": second.text_embeds, "time_ids": time_ids_B6}
        return {"encoder_hidden_states": states_BTD, "added_cond_kwargs": added}

    def pipeline(self, modules, vae, tokenizer, scheduler) -> StableDiffusionXLPipeline:
        return StableDiffusionXLPipeline(
            vae=vae,
            unet=modules["unet"],
            text_encoder=modules["text_encoder"],
            text_encoder_2=modules["text_encoder_2"],
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            scheduler=scheduler,
            # Caption dropout trained the empty string, so guidance has to start from it and not from zeros.
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )


if __name__ == "__main__":
    pipelines.build(SdxlTiny())
