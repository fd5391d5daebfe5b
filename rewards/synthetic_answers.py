"""The exact judge of the synthetic world for answers: is what a model says in the image?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mmalign.reward import RewardOutput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from mmalign.synthetic.answers import CaptionScore


class SyntheticAnswers:
    """Exact score of an answer about an image of the synthetic world, against the true answer (no model).

    Captions: F1 of the mentioned objects. Short answers (yes or no, a colour, a shape, a number): 1 or 0.

    Sub-scores: `exact` (0 or 1), and for captions (NaN otherwise) `grounded` (share of the mentioned objects that are
    there), `recall` (share of the objects that are mentioned) and `mentioned` (how many it mentions relative to the
    truth; 1 is the right length). A model that learns to say less raises `grounded` and lowers the last two.

    Columns of the data: `truth`, the true answer as text. Marks point out each mentioned object, or the short answer.
    """

    needs_prompt = False
    range = (0.0, 1.0)
    scale = "F1 of mentioned objects, or 0/1"

    def __call__(
        self, images: Sequence[Sequence[Image.Image]], *, responses: Sequence[str], truth: Sequence[str]
    ) -> RewardOutput:
        from mmalign.synthetic.answers import is_caption, score_caption, short_answer_is_right, short_answers

        scores: list[float | None] = []
        errors: list[str | None] = []
        captions: list[CaptionScore | None] = []
        exact: list[float] = []
        marks: list[list[tuple[int, int, str]]] = []
        for response, true in zip(responses, truth, strict=True):
            caption = None
            try:
                if not isinstance(true, str):
                    raise ValueError(f"the column `truth` holds {true!r}, expected the true answer as text")
                if is_caption(true):
                    caption = score_caption(response, true)
                    scores.append(caption.f1)
                    exact.append(float(caption.exact))
                    marks.append(_caption_marks(caption))
                else:
                    right = short_answer_is_right(response, true)
                    scores.append(float(right))
                    exact.append(float(right))
                    given = short_answers(response, true)
                    marks.append([(a, b, "right" if answer == true else "wrong") for answer, a, b in given])
                errors.append(None)
            except ValueError as error:
                # One by one: a row without a usable truth costs no other its score.
                scores.append(None)
                exact.append(math.nan)
                marks.append([])
                errors.append(str(error))
            captions.append(caption)

        def column(name: str) -> list[float]:
            return [math.nan if caption is None else getattr(caption, name) for caption in captions]

        grounded = [1.0 - hallucination for hallucination in column("hallucination")]
        sub_scores = {
            "grounded": grounded,
            "recall": column("recall"),
            "exact": exact,
            "mentioned": column("mentioned"),
        }
        return RewardOutput(scores, sub_scores, errors, marks)

    def fingerprint(self) -> str:
        # The judge's own code decides every score.
        import inspect

        from mmalign.synthetic import answers, questions, scenes

        return "".join(inspect.getsource(module) for module in (answers, questions, scenes))


def _caption_marks(caption: CaptionScore) -> list[tuple[int, int, str]]:
    """Each mention once; "two red circles" about one is hallucinated as a whole."""
    absent = {(m.start, m.end) for m, is_there in zip(caption.mentions, caption.grounded, strict=True) if not is_there}
    spans = dict.fromkeys((m.start, m.end) for m in caption.mentions)
    return [(start, end, "hallucinated" if (start, end) in absent else "right") for start, end in spans]
