"""Components that more than one tiny pipeline has."""

from __future__ import annotations

import common
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig

TEXT_WIDTH = 64
CONTEXT_LENGTH = 24


def text_config(tokenizer) -> CLIPTextConfig:
    # Without the tokenizer's ids the pooled embedding is read at id 49407, which never occurs: all prompts pool alike.
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=TEXT_WIDTH,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def unet(**settings) -> UNet2DConditionModel:
    """Two levels on 8 x 8 x 4 latents; `settings` say what the text conditioning looks like."""
    return UNet2DConditionModel(
        sample_size=common.SIZE_PX // 8,
        block_out_channels=(32, 56),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        **settings,
    )
