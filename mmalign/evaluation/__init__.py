"""Evidence: the same prompts from the same noise, before and after, scored, compared and shown.

`compare.py` (images) and `answers.py` (answers) sample, score and write; what they share is in `scores.py` (every reward
on every sample), `statistics.py` (the arithmetic of paired comparisons: pure arrays, no I/O), `report.py` (what may be
concluded, report.json) and `page.py` with the template `report.html`. `image_report.py`, `answer_report.py` and the
templates of their pages add what is particular to each; `grid.py` and `answer_grid.py` draw grid.png with `drawing.py`.
`prompts.py` reads prompt lists. Rewards come in as `mmalign.reward.Scorer`; nothing here knows one by name. To add a
number to the report, add a field to `statistics.Comparison`: report.json carries it by itself, the page's summary table
needs a column.

The functions here choose by what a policy makes: `image` (diffusion, flow) or `text` (language models).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mmalign.config import EvaluateConfig
    from mmalign.evaluation.report import Report
    from mmalign.reward import Scorer

Modality = Literal["image", "text"]


def check_evaluation(modality: Modality, config: EvaluateConfig, scorers: Sequence[Scorer]) -> None:
    """Read the prompts or questions and look at the rewards, before a training is spent on them.

    Raises `ValueError` for a list that cannot be read, or a reward for the other modality.
    """
    from mmalign.evaluation.scores import check_units

    if config.prompts is None:
        return
    if modality == "text":
        from mmalign.data.questions import read_questions

        read_questions(config.prompts, config.limit)
    else:
        from mmalign.evaluation.prompts import read_prompts

        read_prompts(config.prompts, config.limit)
    check_units(scorers, "answer" if modality == "text" else "image")


def evaluate_policy(
    policy: Any, config: EvaluateConfig, scorers: Sequence[tuple[Scorer, bool]], folder: Path, **settings: Any
) -> Report:
    """Two views of one policy, compared: `compare.evaluate` or `answers.evaluate_answers`, which say the settings."""
    if policy.modality == "text":
        from mmalign.evaluation.answers import evaluate_answers

        return evaluate_answers(policy, config, scorers, folder, **settings)
    from mmalign.evaluation.compare import evaluate

    return evaluate(policy, config, scorers, folder, **settings)


def compare_policies(
    modality: Modality,
    models: Iterable[tuple[str, Any, Any]],
    config: EvaluateConfig,
    scorers: Sequence[tuple[Scorer, bool]],
    folder: Path,
    **settings: Any,
) -> Report:
    """(label, policy, view) of any number of models, compared with the first: `compare.compare_models` or
    `answers.compare_answer_models`, which say the settings.

    The modality is an argument because `models` may be a generator that loads them one at a time.
    """
    if modality == "text":
        from mmalign.evaluation.answers import compare_answer_models

        return compare_answer_models(models, config, scorers, folder, **settings)
    from mmalign.evaluation.compare import compare_models

    return compare_models(models, config, scorers, folder, **settings)
