"""Train assets/sd3-tiny: a real StableDiffusion3Pipeline at tiny width.

python assets/build/vae.py && python assets/build/sd3.py
"""

from __future__ import annotations

from typing import ClassVar

import common
import pipelines
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from objectives import RectifiedFlow
from parts import TEXT_WIDTH, text_config
from transformers import CLIPTextModelWithProjection

PATCH_SIZE = 2
NUM_LAYERS = 6
NUM_HEADS = 2
HEAD_WIDTH = 32
# Without its T5 encoder the pipeline appends max_sequence_length zero tokens to the CLIP states. 8 keep a step short;
# now and then a batch has the 256 of a call that does not say, which would swamp the 24 real tokens otherwise.
NUM_T5_TOKENS = 8
DEFAULT_T5_TOKENS = 256
DEFAULT_T5_EVERY = 20


def silence_modulation(transformer: SD3Transformer2DModel) -> None:
    """Start every block as the identity and the output at zero (adaLN-Zero, DiT, arXiv 2212.09748, section 3.2)."""
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and (".norm1" in name or "norm_out" in name or name == "proj_out"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


class Sd3Tiny(pipelines.Family):
    """The SD3 family: rectified flow, joint attention, penultimate states and pooled projections of two encoders."""

    name = "sd3-tiny"
    pipeline_class = StableDiffusion3Pipeline
    denoiser = "transformer"
    objective = RectifiedFlow(shift=1.0, logit_normal=True)
    seed = 51
    # The dev share passes its target between steps 3000 and 4000 of this schedule; what comes after is not needed.
    steps = 4500
    schedule_steps = 8000
    # T5 is optional in SD3, but diffusers loads a folder without it only when told so.
    load: ClassVar[dict[str, object]] = {"text_encoder_3": None, "tokenizer_3": None}
    call: ClassVar[dict[str, object]] = {"max_sequence_length": NUM_T5_TOKENS}
    variants: ClassVar[dict[str, dict[str, object]]] = {
        "10 steps": {"num_inference_steps": 10},
        "max_sequence_length 256": {"max_sequence_length": DEFAULT_T5_TOKENS},
    }
    remarks: ClassVar[tuple[str, ...]] = (
        "There is no T5: the pipeline appends `max_sequence_length` zero tokens instead, "
        f"{NUM_T5_TOKENS} in training and {DEFAULT_T5_TOKENS}, diffusers' default, in one batch of {DEFAULT_T5_EVERY}.",
    )

    def components(self, tokenizer) -> dict[str, torch.nn.Module]:
        transformer = SD3Transformer2DModel(
            sample_size=common.SIZE_PX // 8,
            patch_size=PATCH_SIZE,
            in_channels=4,
            out_channels=4,
            num_layers=NUM_LAYERS,
            num_attention_heads=NUM_HEADS,
            attention_head_dim=HEAD_WIDTH,
            joint_attention_dim=2 * TEXT_WIDTH,
            caption_projection_dim=NUM_HEADS * HEAD_WIDTH,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=common.SIZE_PX // 8 // PATCH_SIZE,
            qk_norm="rms_norm",
        )
        silence_modulation(transformer)
        return {
            "transformer": transformer,
            "text_encoder": CLIPTextModelWithProjection(text_config(tokenizer)),
            "text_encoder_2": CLIPTextModelWithProjection(text_config(tokenizer)),
        }

    def condition(self, modules, ids_BT: torch.Tensor, time_ids_B6: torch.Tensor, step: int) -> dict:
        encoders = (modules["text_encoder"], modules["text_encoder_2"])
        outs = [encoder(ids_BT, output_hidden_states=True) for encoder in encoders]
        states_BTD = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)
        num_zeros = DEFAULT_T5_TOKENS if step % DEFAULT_T5_EVERY == DEFAULT_T5_EVERY - 1 else NUM_T5_TOKENS
        zeros_BTD = states_BTD.new_zeros(len(ids_BT), num_zeros, states_BTD.shape[-1])
        return {
            "encoder_hidden_states": torch.cat([states_BTD, zeros_BTD], dim=1),
            "pooled_projections": torch.cat([out.text_embeds for out in outs], dim=-1),
        }

    def pipeline(self, modules, vae, tokenizer, scheduler) -> StableDiffusion3Pipeline:
        vae.register_to_config(shift_factor=0.0)  # the pipeline adds it; the latents' means are zero already
        return StableDiffusion3Pipeline(
            transformer=modules["transformer"],
            scheduler=scheduler,
            vae=vae,
            text_encoder=modules["text_encoder"],
            tokenizer=tokenizer,
            text_encoder_2=modules["text_encoder_2"],
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )


if __name__ == "__main__":
    pipelines.build(Sd3Tiny())
