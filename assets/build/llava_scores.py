"""Exact scores of assets/llava-tiny through the stock processor and `generate`: captions, short questions, images.

Shapes: none cross a function here; everything is texts and numbers.
"""

from __future__ import annotations

import common
import numpy as np
import torch
from PIL import Image

from mmalign.synthetic.answers import score_caption, short_answer_is_right, summary
from mmalign.synthetic.questions import (
    CAPTION_QUESTION,
    IMAGE_MARK,
    QUESTION_KINDS,
    EvaluationQuestion,
    describe,
    evaluation_questions,
)
from mmalign.synthetic.render import render
from mmalign.synthetic.scenes import TIERS, Split, Tier, captions, parse, sample_scenes

MAX_NEW_TOKENS = 32


@torch.no_grad()
def answers(model, processor, questions, *, sampled: bool, seed: int = 0, batch_size: int = 100) -> list[str]:
    """One answer per question, greedy or drawn at temperature 1 from the whole vocabulary."""
    torch.manual_seed(seed)
    found: list[str] = []
    for start in range(0, len(questions), batch_size):
        batch: list[EvaluationQuestion] = list(questions[start : start + batch_size])
        # Kept as one string per question: the marks of several images stand inside its text.
        chats = [[{"role": "user", "content": q.prompt}] for q in batch]
        texts = processor.apply_chat_template(chats, add_generation_prompt=True)
        images = [[Image.fromarray(image) for image in q.images] for q in batch]
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {"do_sample": False}
        out = model.generate(**inputs, **how, max_new_tokens=MAX_NEW_TOKENS)
        found += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def caption_scores(model, processor, questions, *, sampled: bool, draws: int = 1) -> dict[str, float]:
    """Corpus rates of captions; `draws` per scene when sampled."""
    scores = []
    for draw in range(draws):
        texts = answers(model, processor, questions, sampled=sampled, seed=draw)
        scores += [score_caption(text, q.truth) for text, q in zip(texts, questions, strict=True)]
    return {name: round(value, 4) for name, value in summary(scores).items()}


def accuracy(model, processor, questions, *, sampled: bool = False) -> float:
    """Share of right short answers."""
    texts = answers(model, processor, questions, sampled=sampled)
    right = [short_answer_is_right(text, q.truth) for text, q in zip(texts, questions, strict=True)]
    return round(float(np.mean(right)), 4)


def pipeline_images(tier: Tier, split: Split, num: int, seed: int) -> list[EvaluationQuestion]:
    """Caption questions about renders as the diffusion pipelines draw them: 64 px, one object of any size and place
    (attributes) or two in a relation."""
    texts = [text for text in captions(tier, split) if parse(text).relation is not None or tier == "attributes"]
    rng = np.random.default_rng([seed, len(texts)])
    scenes = sample_scenes([texts[k % len(texts)] for k in range(num)], rng)
    return [
        EvaluationQuestion(
            id=f"{tier}-{split}-{seed}-{index}",
            kind="caption",
            prompt=f"{IMAGE_MARK}\n{CAPTION_QUESTION}",
            images=(image,),
            truth=describe(sorted(scene.objects, key=lambda o: o.cell)),
            scenes=(scene,),
        )
        for index, (scene, image) in enumerate(zip(scenes, render(scenes, common.SIZE_PX), strict=True))
    ]


def all_scores(model, processor, split: Split, num: int, seed: int = 0, draws: int = 2) -> dict:
    """The card's table: captions and short questions, greedy and sampled, questions about 2 and 3 images, and captions
    of images as the pipelines draw them."""
    questions = {kind: list(evaluation_questions(split, num, seed, kind)) for kind in QUESTION_KINDS}
    for n in (2, 3):
        halves = [evaluation_questions(split, num // 2, seed, kind, n) for kind in ("colour", "shape")]
        questions[f"{n}_images"] = [q for half in halves for q in half]
    about = questions.pop("caption")
    pipelines = {tier: pipeline_images(tier, split, num // 2, seed) for tier in TIERS}
    return {
        "captions": {
            "greedy": caption_scores(model, processor, about, sampled=False),
            "sampled": caption_scores(model, processor, about, sampled=True, draws=draws),
        },
        "answers": {
            how: {
                name: accuracy(model, processor, asked, sampled=how == "sampled") for name, asked in questions.items()
            }
            for how in ("greedy", "sampled")
        },
        "pipeline_images": {
            tier: caption_scores(model, processor, asked, sampled=False) for tier, asked in pipelines.items()
        },
    }
