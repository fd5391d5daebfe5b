"""Tiny random LLaVA folders in stock classes, in the variants that real checkpoints come in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmalign.policies.tokens import TokenContext, TokenTarget
from mmalign.types import ImageRef, Request, Row

WORDS = (  # noqa: SIM905
    "<pad> <s> </s> <unk> <image> <system> <user> <assistant> USER ASSISTANT : . , ? ! a an the there is are and no yes "
    "red green blue circle square cross what colour how many in picture 1 2 3 first second before after left of to"
).split()
INLINE_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<' + message['role'] + '> ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% if message['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# The template of llava-1.5-7b-hf: images before text, and no end of turn.
LLAVA15_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Nothing between prompt and answer: a tokenizer that splits at spaces joins them.
JOINING_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image> ' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens=["<image>", "<system>", "<user>", "<assistant>"],
        padding_side="left",
    )


def build_llava(
    folder: Path,
    *,
    image_px: int = 32,
    vision_feature_layer: int | list[int] = -2,
    strategy: str = "default",
    text: str = "llama",
    template: str | None = INLINE_TEMPLATE,
    max_positions: int = 128,
    tied: bool = False,
    **text_settings: Any,
) -> str:
    """Write model and processor to `folder`; 8 px patches, so (image_px / 8)² image tokens (+ 1 with `full`)."""
    from transformers import (
        AutoConfig,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    vision = CLIPVisionConfig(
        image_size=image_px,
        patch_size=8,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=24,
    )
    settings: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": max_positions,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": tied,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config=AutoConfig.for_model(text, **settings | text_settings),
        image_token_index=WORDS.index("<image>"),
        vision_feature_select_strategy=strategy,
        vision_feature_layer=vision_feature_layer,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"height": image_px, "width": image_px}, do_center_crop=False),
        tokenizer=make_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
        chat_template=template,
    )
    processor.save_pretrained(folder)
    return str(folder)


def picture(seed: int, size: tuple[int, int] = (40, 28)) -> ImageRef:
    """A random picture of (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return ImageRef.from_pil(Image.fromarray(pixels), source=f"picture {seed}")


def make_rows() -> list[Row]:
    """Rows of unlike lengths: one image, two images, a dialogue, no image."""
    from mmalign.types import Turn

    return [
        Row("r0", "<image>\nwhat is in the picture ?", "a red circle .", "no .", source="f:0", images=(picture(0),)),
        Row(
            "r1",
            "<image> first <image> second : what colour is the square ?",
            "the square is blue and the first circle is red .",
            "red .",
            source="f:1",
            images=(picture(1), picture(2, (64, 64))),
        ),
        Row(
            "r2",
            "how many ?",
            "2 .",
            "there are 3 .",
            source="f:2",
            images=(picture(0),),
            history=(Turn("user", "<image>\nis there a circle ?"), Turn("assistant", "yes .")),
        ),
        Row("r3", "is the circle red ?", "yes .", "no , the circle is blue .", source="f:3"),
    ]


def context_of(policy: Any, row: Row) -> TokenContext:
    records = policy.encode_images([ref.open() for ref in row.images]) if row.images else []
    return TokenContext(
        policy.tokenize(row, "chosen")[0],
        tuple(record["features"] for record in records),
        tuple(ref.digest() for ref in row.images),
    )


def requests_of(policy: Any, rows: list[Row]) -> list[Request]:
    """Chosen of all rows, then rejected of all rows, as the preference methods ask."""
    contexts = [context_of(policy, row) for row in rows]
    sides = [("chosen", row, c) for row, c in zip(rows, contexts, strict=True)]
    sides += [("rejected", row, c) for row, c in zip(rows, contexts, strict=True)]
    return [Request(c, TokenTarget(policy.tokenize(row, side)[1]), ()) for side, row, c in sides]


def nudge(policy: Any, scale: float = 0.05) -> None:
    """Move the trained weights, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def public_scores(model: Any, processor: Any, rows: list[Row], policy: Any) -> list[torch.Tensor]:
    """Σ log p of chosen and rejected, one forward of the public class each, from pixels: the independent reference."""
    scores = []
    for side in ("chosen", "rejected"):
        for row in rows:
            ids_P, ids_T = policy.tokenize(row, side)
            images = [ref.open() for ref in row.images]
            pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"] if images else None
            logits = model(input_ids=torch.cat([ids_P, ids_T])[None], pixel_values=pixels).logits[0].float()
            logp = torch.log_softmax(logits[len(ids_P) - 1 : -1], dim=-1)
            scores.append(logp.gather(1, ids_T[:, None]).sum())
    return scores
