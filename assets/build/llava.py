"""Train assets/llava-tiny: a real LlavaForConditionalGeneration at tiny width that knows what it sees and hallucinates.

    python assets/build/llava.py

Vision warm-up (colour and shape of every grid cell), then packed question blocks with noisy answers (`llava_data`).
The checkpoint is chosen on the dev scenes; held-out scenes are scored on the exported fp16 folder, at the end.

Shapes: B rows, N images, S tokens, C channels, H = W = IMAGE_PX, D features.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path

import cards
import common
import llava_data
import llava_scores
import numpy as np
import torch
import torch.nn.functional as F
from llava_data import TOKEN, WORDS
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mmalign.synthetic.questions import IMAGE_MARK, IMAGE_PX, evaluation_questions
from mmalign.synthetic.render import render
from mmalign.synthetic.scenes import COLOURS, SHAPES

NAME = "llava-tiny"
SEED = 61
STEPS = 2000
WARMUP_STEPS = 1200
PATCH_PX = 16
VISION_WIDTH = 96
TEXT_WIDTH = 128
# At the usual 0.02 a model of this width does not learn to bind colours to shapes.
INITIALIZER_RANGE = 0.08
LEARNING_RATE = 2e-3
WARMUP_LEARNING_RATE = 2e-3
VISION_LOSS_WEIGHT = 0.3
CHECKPOINT_EVERY = 200
NUM_DEV = 400
NUM_HELDOUT = 600
DRAWS = 4
# Share of the objects mentioned in sampled captions that are absent: enough to repair, and enough that is right.
TARGET_HALLUCINATION = 0.30
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<' + message['role'] + '> ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{{ ' ' + eos_token }}"
    "{% endgeneration %}{{ ' ' }}{% else %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ ' ' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def make_model() -> LlavaForConditionalGeneration:
    """The untrained model; stock classes and forward, everything small."""
    vision = CLIPVisionConfig(
        image_size=IMAGE_PX,
        patch_size=PATCH_PX,
        hidden_size=VISION_WIDTH,
        intermediate_size=4 * VISION_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=VISION_WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=TEXT_WIDTH,
        intermediate_size=3 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=False,
        bos_token_id=TOKEN["<s>"],
        eos_token_id=TOKEN["</s>"],
        pad_token_id=TOKEN["<pad>"],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=TOKEN[IMAGE_MARK],
        image_seq_length=llava_data.IMAGE_TOKENS,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,  # the usual -2 would leave a third of this vision tower unused
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


def make_processor() -> LlavaProcessor:
    """Word-level tokenizer, CLIP image processor at 48 px, and the chat template."""
    content = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "Punctuation", "behavior": "Isolated"}],
        },
        "model": {"type": "WordLevel", "vocab": TOKEN, "unk_token": "<unk>"},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(content))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(path),
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            pad_token="<pad>",
            extra_special_tokens=[IMAGE_MARK, "<system>", "<user>", "<assistant>"],
            padding_side="left",
            clean_up_tokenization_spaces=False,
            model_max_length=512,
        )
    image_processor = CLIPImageProcessor(
        size={"height": IMAGE_PX, "width": IMAGE_PX},
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_MARK,
        chat_template=CHAT_TEMPLATE,
    )


class CellHeads(torch.nn.Module):
    """Linear readings of colour and shape from each patch's features; used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.colour = torch.nn.Linear(VISION_WIDTH, len(COLOURS) + 1)
        self.shape = torch.nn.Linear(VISION_WIDTH, len(SHAPES) + 1)

    def forward(self, feature_NPD: torch.Tensor, scenes: list) -> tuple[torch.Tensor, float]:
        """The loss, and the share of object cells whose shape is right."""
        colour_NP, shape_NP = llava_data.cell_labels(scenes)
        shape_NPK = self.shape(feature_NPD)
        loss = F.cross_entropy(self.colour(feature_NPD).flatten(0, 1), colour_NP.flatten())
        loss = loss + F.cross_entropy(shape_NPK.flatten(0, 1), shape_NP.flatten())
        objects = shape_NP < len(SHAPES)
        return loss, float((shape_NPK.argmax(-1) == shape_NP)[objects].float().mean())


def patch_features(model: LlavaForConditionalGeneration, image_NHWC: np.ndarray) -> torch.Tensor:
    """What the projector reads: the last hidden state of every patch [N,9,D]."""
    out = model.model.vision_tower(common.to_model(image_NHWC), output_hidden_states=True)
    return out.hidden_states[-1][:, 1:]


def answer_loss(model: LlavaForConditionalGeneration, rows: llava_data.Rows, feature_NPD: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross entropy over the answer tokens of packed rows."""
    embed_BSD = model.get_input_embeddings()(rows.id_BS)
    image_BS = rows.id_BS == TOKEN[IMAGE_MARK]
    embed_BSD = embed_BSD.masked_scatter(image_BS[..., None], model.model.multi_modal_projector(feature_NPD))
    bias_B1SS = torch.zeros(rows.allowed_BSS.shape).masked_fill(~rows.allowed_BSS, torch.finfo(torch.float32).min)[
        :, None
    ]
    hidden_BSD = model.model.language_model(
        inputs_embeds=embed_BSD, attention_mask=bias_B1SS, position_ids=rows.position_BS, use_cache=False
    ).last_hidden_state
    answered_BS = rows.label_BS >= 0
    nats = F.cross_entropy(model.lm_head(hidden_BSD[answered_BS]), rows.label_BS[answered_BS], reduction="none")
    return (nats * rows.weight_BS[answered_BS]).sum() / rows.weight_BS.sum()


def warm_up(model: LlavaForConditionalGeneration, heads: CellHeads) -> None:
    """Teach the vision tower to read cells; without it the shapes are still unread after 800 steps of questions."""
    tower = model.model.vision_tower
    optimizer = torch.optim.AdamW(
        [*tower.parameters(), *heads.parameters()], lr=WARMUP_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    seen = {"loss": math.nan, "shape": 0.0}
    for step in common.training_steps(
        f"{NAME}-warmup",
        WARMUP_STEPS,
        {"tower": tower, "heads": heads},
        optimizer,
        WARMUP_LEARNING_RATE,
        lambda: f"loss {seen['loss']:.3f} shape {seen['shape']:.2f}",
    ):
        scenes = llava_data.warm_up_scenes(SEED, step)
        loss, seen["shape"] = heads(patch_features(model, render(scenes, IMAGE_PX)), scenes)
        common.optimize(optimizer, loss)
        seen["loss"] = loss.item()


def train(steps: int, checkpoint_steps: tuple[int, ...]) -> LlavaForConditionalGeneration:
    """Warm-up and questions; leaves a checkpoint of every checkpoint step in the work folder."""
    torch.manual_seed(SEED)
    model, heads = make_model(), CellHeads()
    print(f"[{NAME}] {sum(p.numel() for p in model.parameters()):,} parameters, {len(WORDS)} words", flush=True)
    warm_up(model, heads)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    seen = {"loss": math.nan, "shape": 0.0}
    for step in common.training_steps(
        f"{NAME}-train",
        steps,
        {"model": model, "heads": heads},
        optimizer,
        LEARNING_RATE,
        lambda: f"loss {seen['loss']:.3f} shape {seen['shape']:.2f}",
        checkpoint_steps=checkpoint_steps,
    ):
        rows = llava_data.training_rows(SEED, step)
        feature_NPD = patch_features(model, rows.image_NHWC)
        loss = answer_loss(model, rows, feature_NPD)
        seen["loss"] = 0.95 * seen["loss"] + 0.05 * loss.item() if seen["loss"] == seen["loss"] else loss.item()
        vision_loss, seen["shape"] = heads(feature_NPD, rows.scenes)
        common.optimize(optimizer, loss + VISION_LOSS_WEIGHT * vision_loss)
    return model


def checkpoint_model(step: int) -> LlavaForConditionalGeneration:
    """The model of one checkpoint, in fp32."""
    modules = common.trained_modules(f"{NAME}-train-{step}")
    model = make_model()
    model.load_state_dict(modules["model"])
    return model.eval()


def export(model: LlavaForConditionalGeneration, facts: dict) -> Path:
    """Write the fp16 folder with its card in place of the old one."""
    target = common.ASSETS_DIR / NAME
    with common.replaced_folder(target) as folder:
        model.generation_config = GenerationConfig(
            bos_token_id=TOKEN["<s>"],
            eos_token_id=TOKEN["</s>"],
            pad_token_id=TOKEN["<pad>"],
            max_new_tokens=llava_scores.MAX_NEW_TOKENS,
            do_sample=False,
        )
        model.half().save_pretrained(folder)
        make_processor().save_pretrained(folder)
        # transformers computes in the dtype that the config names; half precision on a CPU is slow and coarse.
        config = json.loads((folder / "config.json").read_text())
        for part in (config, config["text_config"], config["vision_config"]):
            part["dtype"] = "float32"
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        common.forget_padding(folder)
        cards.write_card(folder, facts)
    return target


def load_exported() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The shipped folder as a user loads it; computes in fp32."""
    folder = common.ASSETS_DIR / NAME
    return LlavaForConditionalGeneration.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def dev_scores(step: int) -> dict[str, float]:
    """What the choice of a checkpoint looks at."""
    model, processor = checkpoint_model(step), make_processor()
    questions = evaluation_questions("dev", NUM_DEV, 0)
    sampled = llava_scores.caption_scores(model, processor, questions, sampled=True)
    greedy = llava_scores.caption_scores(model, processor, questions, sampled=False)
    exists = llava_scores.accuracy(model, processor, evaluation_questions("dev", NUM_DEV, 0, "exists"))
    return {
        "greedy_hallucination": greedy["hallucination"],
        "greedy_recall": greedy["recall"],
        "sampled_hallucination": sampled["hallucination"],
        "sampled_mentioned": sampled["mentioned"],
        "exists": exists,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=f"Train assets/{NAME}.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--preview", metavar="STEP", type=int, help="export this checkpoint unscored, and stop")
    arguments = parser.parse_args()
    if arguments.preview:
        facts = {"name": NAME, "preview": True, "chosen_step": arguments.preview}
        print(export(checkpoint_model(arguments.preview), facts))
        return
    candidates = tuple(range(CHECKPOINT_EVERY, arguments.steps + 1, CHECKPOINT_EVERY))
    train(arguments.steps, candidates)
    dev = {}
    for step in candidates:
        dev[step] = dev_scores(step)
        print(f"[{NAME}] dev at step {step}: {dev[step]}", flush=True)
    chosen = min(
        candidates,
        key=lambda s: abs(dev[s]["sampled_hallucination"] - TARGET_HALLUCINATION) + 1.0 - dev[s]["greedy_recall"],
    )
    facts = {
        "name": NAME,
        "format": "transformers",
        "image_size_px": IMAGE_PX,
        "image_tokens": llava_data.IMAGE_TOKENS,
        "parameters": sum(p.numel() for p in checkpoint_model(chosen).parameters()),
        "num_words": len(WORDS),
        "chosen_step": chosen,
        "total_steps": arguments.steps,
        "warmup_steps": WARMUP_STEPS,
        "batch_size": llava_data.BATCH_SIZE,
        "seed": SEED,
        "noise_from_step": llava_data.NOISE_FROM_STEP,
        "object_noise": llava_data.OBJECT_NOISE,
        "answer_noise": llava_data.ANSWER_NOISE,
        "first_image_noise": llava_data.FIRST_IMAGE_NOISE,
        "vision_loss_weight": VISION_LOSS_WEIGHT,
        "num_dev": NUM_DEV,
        "num_heldout": NUM_HELDOUT,
        "draws": DRAWS,
        "target_hallucination": TARGET_HALLUCINATION,
        "dev_by_step": {str(step): scores for step, scores in dev.items()},
        "command": "python assets/build/llava.py",
    }
    export(checkpoint_model(chosen), {"name": NAME, "preview": True, "chosen_step": chosen})
    model, processor = load_exported()
    facts["heldout"] = llava_scores.all_scores(model, processor, "heldout", NUM_HELDOUT, draws=DRAWS)
    export(model, facts)
    print(json.dumps(facts["heldout"]), flush=True)


if __name__ == "__main__":
    main()
