"""Make assets/llava-pairs: preference pairs of true answers against answers that llava-tiny itself gave.

    python assets/build/llava.py && python assets/build/llava_pairs.py

Train scenes only. Chosen is the truth; rejected is the model's own answer at temperature 1, kept when it is wrong (a
caption: when it mentions an object that is not there). Yes-or-no pairs are balanced by truth: a model's own errors lean
to one side, and a few dozen of them teach it to answer that side always. Count pairs are balanced likewise.

One Parquet file in the vision-preference row format of TRL (images, prompt, chosen and rejected as message lists), with
the columns id, kind and truth beside it.
"""

from __future__ import annotations

import io
import json
from collections import Counter

import cards
import common
import llava
import llava_scores
import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pil

from mmalign.synthetic.answers import score_caption, short_answer_is_right
from mmalign.synthetic.questions import EvaluationQuestion, QuestionKind, evaluation_questions

NAME = "llava-pairs"
SEED = 62
NUM_PAIRS: dict[QuestionKind, int] = {"caption": 640, "exists": 160, "colour": 64, "shape": 64, "count": 48}
BALANCED_BY_TRUTH = ("exists", "count")
# Questions asked per pair wanted; 3 in 10 short answers are wrong, and every second caption.
ASKED_PER_PAIR = 6
TURN = {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
FEATURES = Features(
    {
        "id": Value("string"),
        "kind": Value("string"),
        "images": List(Image()),
        "prompt": List(TURN),
        "chosen": List(TURN),
        "rejected": List(TURN),
        "truth": Value("string"),
    }
)


def own_errors(model, processor, kind: QuestionKind) -> list[tuple[EvaluationQuestion, str]]:
    """Questions of the train split that the model answered wrong, with its answer; as many as the file wants."""
    num = NUM_PAIRS[kind]
    questions = evaluation_questions("train", num * ASKED_PER_PAIR, SEED, kind)
    texts = llava_scores.answers(model, processor, questions, sampled=True, seed=SEED)
    wrong = [(q, text) for q, text in zip(questions, texts, strict=True) if _is_wrong(text, q.truth, kind)]
    if kind in BALANCED_BY_TRUTH:
        truths = dict.fromkeys(q.truth for q in questions)
        limit = num // len(truths)
        taken: Counter[str] = Counter()
        balanced = []
        for q, text in wrong:
            taken[q.truth] += 1
            if taken[q.truth] <= limit:
                balanced.append((q, text))
        wrong = balanced
    if len(wrong) < num:
        raise ValueError(f"{len(wrong)} wrong answers of kind {kind}, {num} wanted; raise ASKED_PER_PAIR")
    return wrong[:num]


def _is_wrong(text: str, truth: str, kind: QuestionKind) -> bool:
    if kind == "caption":
        return score_caption(text, truth).num_absent > 0
    # An answer of another kind of question is no preference about this one.
    return not short_answer_is_right(text, truth) and len(text.split()) == 1


def row(question: EvaluationQuestion, rejected: str) -> dict:
    buffer = io.BytesIO()
    Pil.fromarray(question.images[0]).save(buffer, format="PNG", optimize=True)
    text = question.prompt.split("\n", 1)[1]
    prompt = [{"type": "image", "text": None}, {"type": "text", "text": text}]

    def answer(words: str) -> list[dict]:
        return [{"role": "assistant", "content": [{"type": "text", "text": words}]}]

    return {
        "id": f"own-{question.id}",
        "kind": question.kind,
        "images": [{"bytes": buffer.getvalue(), "path": None}],
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": answer(question.truth),
        "rejected": answer(rejected),
        "truth": question.truth,
    }


def main() -> None:
    model, processor = llava.load_exported()
    rows = [row(q, text) for kind in NUM_PAIRS for q, text in own_errors(model, processor, kind)]
    rows = [rows[int(k)] for k in np.random.default_rng(SEED).permutation(len(rows))]

    def words(side: str) -> float:
        counts = [len(r[side][0]["content"][0]["text"].split()) for r in rows if r["kind"] == "caption"]
        return round(float(np.mean(counts)), 3)

    model_card = json.loads((common.ASSETS_DIR / llava.NAME / "card.json").read_text())
    facts = {
        "name": NAME,
        "format": "Parquet, TRL vision preference rows",
        "model": llava.NAME,
        "model_step": model_card["chosen_step"],
        "num_pairs": len(rows),
        "pairs_by_kind": NUM_PAIRS,
        "caption_words": {"chosen": words("chosen"), "rejected": words("rejected")},
        "split": "train",
        "temperature": 1.0,
        "seed": SEED,
        "command": "python assets/build/llava_pairs.py",
    }
    with common.replaced_folder(common.ASSETS_DIR / NAME) as folder:
        Dataset.from_list(rows, features=FEATURES).to_parquet(folder / "train.parquet")
        cards.write_card(folder, facts)
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
