"""The exact judge of the synthetic world as a reward: does the image show what its caption says?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from mmalign.reward import RewardOutput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from mmalign.synthetic.scorer import ImageScore


class SyntheticTruth:
    """Exact share of an image's caption that the image shows, for captions of the synthetic world (no model).

    Sub-scores: `graded` (soft, moves before a part flips), `fraction` (share of right parts), `all_right` (0 or 1), and
    one 0-or-1 line per part: background, colour, shape, size, count, relation (NaN where the caption has no such part).

    Args:
        score: which of the summaries is the score; `total` is the mean of graded and fraction.
    """

    needs_prompt = True
    range = (0.0, 1.0)
    scale = "share of the caption that is right"

    def __init__(self, *, score: Literal["total", "graded", "fraction", "all_right"] = "total") -> None:
        self.score = score

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> RewardOutput:
        from mmalign.synthetic.scorer import score

        results: list[ImageScore | None] = []
        errors: list[str | None] = []
        for image, prompt in zip(images, prompts, strict=True):
            # One by one: an image that cannot be judged (not square, no such caption) costs no other its score.
            try:
                results.append(score([image], [prompt]).images[0])
                errors.append(None)
            except ValueError as error:
                results.append(None)
                errors.append(str(error))

        def column(name: str) -> list[float]:
            return [math.nan if result is None else getattr(result, name) for result in results]

        parts = dict.fromkeys(part.name for result in results if result is not None for part in result.parts)
        sub_scores = {name: column(name) for name in ("graded", "fraction", "all_right")}
        for name in parts:
            sub_scores[name] = [
                math.nan
                if result is None
                else next((float(part.right) for part in result.parts if part.name == name), math.nan)
                for result in results
            ]
        return RewardOutput(column(self.score), sub_scores, errors)

    def fingerprint(self) -> str:
        # The judge's own code decides every score.
        import inspect

        from mmalign.synthetic import render, scenes, scorer

        return "".join(inspect.getsource(module) for module in (render, scenes, scorer))
