"""Before and after for language models: the same questions with the same random numbers, answered, scored and compared.

Answers go to disk as they are made, so an interrupted evaluation continues, and those of a model whose weights and
settings have not changed are kept.

Shape legend: L models (0 is the baseline), P questions, S samples per question; the axis of guidance scales has length 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmalign.evaluation.answer_grid import draw_answers
from mmalign.evaluation.answer_report import AnswerReport, question_text
from mmalign.evaluation.compare import weights_fingerprint
from mmalign.evaluation.files import slug, write_text
from mmalign.evaluation.report import compare_scores, write_report
from mmalign.evaluation.scores import Index, Inputs, Progress, Scores, check_units, score_samples
from mmalign.types import Row

if TYPE_CHECKING:
    from mmalign.config import EvaluateConfig
    from mmalign.policies.base import View
    from mmalign.reward import Scorer

RESPONSES = "responses"
"""The column in which rewards receive the answers."""


def evaluate_answers(
    policy: Any,
    config: EvaluateConfig,
    scorers: Sequence[tuple[Scorer, bool]],
    folder: Path,
    *,
    before: View = "reference",
    after: View = "policy",
    labels: tuple[str, str] = ("before", "after"),
    title: str = "Before and after",
    details: Mapping[str, str] | None = None,
    samples: Path | None = None,
    progress: Progress | None = None,
) -> AnswerReport:
    """Compare the answers of two views of one policy.

    Args:
        policy: one with `answer(rows, seeds, *, temperature, max_new_tokens)`.
        scorers: (reward, whether training used it), in the order of the report; the first makes the headline.
        folder: gets `grid.png`, `report.html`, `report.json`, `answers.jsonl` and `samples/VIEW/answers.jsonl`.
        details: run information for the header, e.g. {"checkpoint": "step 2000"}.
        samples: another folder for the kept answers, so that several evaluations share the baseline's.

    Raises `ValueError` if `config.prompts` is unset or unusable, or a reward is for images or fails for all answers.
    """
    models = [(labels[0], policy, before), (labels[1], policy, after)]
    return _compare(models, [before, after], config, scorers, folder, title, details, samples, progress)


def compare_answer_models(
    models: Iterable[tuple[str, Any, View]],
    config: EvaluateConfig,
    scorers: Sequence[tuple[Scorer, bool]],
    folder: Path,
    *,
    title: str = "Comparison",
    details: Mapping[str, str] | None = None,
    samples: Path | None = None,
    progress: Progress | None = None,
) -> AnswerReport:
    """Compare the answers of any number of models with the first's.

    Args:
        models: (label, policy, view). May be a generator: each policy answers before the next is asked for, so models
            that do not fit into memory together can be loaded one at a time.

    The other arguments are those of `evaluate_answers`; answers lie in `samples/LABEL/`.
    """
    return _compare(models, None, config, scorers, folder, title, details, samples, progress)


@dataclass(frozen=True)
class _Plan:
    """What to ask, the same for every model. `digests` are the content addresses of each row's images."""

    rows: Sequence[Row]
    digests: Sequence[tuple[str, ...]]
    seeds: Sequence[int]
    temperature: float
    max_new_tokens: int
    batch_size: int


def _compare(
    models: Iterable[tuple[str, Any, View]],
    folder_names: Sequence[str] | None,
    config: EvaluateConfig,
    scorers: Sequence[tuple[Scorer, bool]],
    folder: Path,
    title: str,
    details: Mapping[str, str] | None,
    samples: Path | None,
    progress: Progress | None,
) -> AnswerReport:
    from mmalign.data.questions import read_questions

    if config.prompts is None:
        raise ValueError("evaluate.prompts is not set; give a file with questions")
    check_units([scorer for scorer, _ in scorers], "answer")
    rows, digests, num_repeated = _unique(read_questions(config.prompts, config.limit))
    plan = _Plan(
        rows,
        digests,
        # Greedy answers do not depend on the seed: more of them would be the same answer again.
        tuple(range(config.seeds if config.temperature else 1)),
        config.temperature,
        config.max_new_tokens,
        config.batch_size,
    )
    sample_root = samples or folder / "samples"
    labels: list[str] = []
    names: list[str] = []
    kinds: set[tuple[type, str]] = set()
    texts: list[NDArray[Any]] = []
    for label, policy, view in models:
        if label in labels:
            raise ValueError(f"two models are both called {label!r}; give each its own label")
        name = folder_names[len(labels)] if folder_names else f"{len(labels)}-{slug(label)}"
        texts.append(_ask_model(policy, view, plan, sample_root / name, f"sample {label}", progress))
        labels.append(label)
        names.append(policy.name)
        kinds.add((type(policy), policy.encode_key("prompt")))
        # The loop variable must not keep this model alive while a generator loads the next one.
        del policy
    if len(labels) < 2:
        raise ValueError(f"a comparison needs at least two models, got {len(labels)}")
    answers = np.stack(texts)
    scores = _score_answers(answers, rows, scorers, progress)
    shown = [("model", " · ".join(dict.fromkeys(names))), *(details or {}).items()]
    if num_repeated:
        shown.append(("repeated questions left out", str(num_repeated)))
    report = AnswerReport(
        title=title,
        labels=tuple(labels),
        models=tuple(names),
        prompts=tuple(question_text(row) for row in rows),
        seeds=tuple(plan.seeds),
        identical_noise=len(kinds) == 1,
        rewards=scores.rewards,
        scores=scores.values,
        rows=tuple(rows),
        answers=answers,
        marks=scores.marks,
        digests=tuple(digests),
        temperature=plan.temperature,
        max_new_tokens=plan.max_new_tokens,
        details=tuple((str(key), str(value)) for key, value in shown),
    )
    report = replace(report, entries=compare_scores(scores.rewards, scores.values, labels))
    draw_answers(report, folder / "grid.png", config.grid_prompts)
    write_report(report, folder)
    return report


def _unique(rows: Sequence[Row]) -> tuple[list[Row], list[tuple[str, ...]], int]:
    """Each question once, with its images' content addresses: a repeated one would only make the interval too narrow."""
    found: dict[tuple[Any, ...], tuple[Row, tuple[str, ...]]] = {}
    for row in rows:
        digests = tuple(image.digest() for image in row.images)
        found.setdefault((row.history, row.prompt, digests), (row, digests))
    kept = list(found.values())
    return [row for row, _ in kept], [digests for _, digests in kept], len(rows) - len(kept)


def _ask_model(
    policy: Any, view: View, plan: _Plan, folder: Path, phase: str, progress: Progress | None
) -> NDArray[Any]:
    """Texts `[1, P, S]` of one model; those already there from the same weights and settings are kept."""
    jobs = [(p, s) for p in range(len(plan.rows)) for s in range(len(plan.seeds))]
    keys = [_question_key(row, digests) for row, digests in zip(plan.rows, plan.digests, strict=True)]
    texts: NDArray[Any] = np.empty((1, len(plan.rows), len(plan.seeds)), dtype=object)
    done = 0
    with policy.view(view):
        about = {
            "model": policy.name,
            "view": view,
            "weights": weights_fingerprint(policy, view),
            "encoders": [policy.encode_key("prompt"), policy.encode_key("image")],
            "temperature": plan.temperature,
            "max_new_tokens": plan.max_new_tokens,
        }
        kept = _open_kept(folder / "answers.jsonl", about)
        with (folder / "answers.jsonl").open("a", encoding="utf-8") as file:
            for start in range(0, len(jobs), plan.batch_size):
                batch = jobs[start : start + plan.batch_size]
                # A batch is made whole or not at all: the same batches on every side keep equal weights bit-equal.
                if not all((keys[p], plan.seeds[s]) in kept for p, s in batch):
                    made = policy.answer(
                        [plan.rows[p] for p, _ in batch],
                        [plan.seeds[s] for _, s in batch],
                        temperature=plan.temperature,
                        max_new_tokens=plan.max_new_tokens,
                    )
                    for (p, s), answer in zip(batch, made, strict=True):
                        kept[keys[p], plan.seeds[s]] = answer.text
                        line = {"question": keys[p], "id": plan.rows[p].id, "seed": plan.seeds[s], "text": answer.text}
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()
                for p, s in batch:
                    texts[0, p, s] = kept[keys[p], plan.seeds[s]]
                done += len(batch)
                if progress:
                    progress(phase, done, len(jobs))
    return texts


def _question_key(row: Row, digests: Sequence[str]) -> str:
    """What an answer depends on apart from weights, settings and seed; the id because the random numbers follow it."""
    text = json.dumps([row.id, [[turn.role, turn.text] for turn in row.history], row.prompt, list(digests)])
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def _open_kept(path: Path, about: Mapping[str, Any]) -> dict[tuple[str, int], str]:
    """Answers by (question, seed) that belong to `about`. Afterwards the file holds these alone, under a first line that
    says who made them: answers of other weights are gone, and so is the half line of an evaluation that was killed."""
    kept: dict[tuple[str, int], str] = {}
    lines: list[dict[str, Any]] = []
    whole = False
    if path.is_file():
        content = path.read_bytes()
        records = _read_lines(content)
        if records and (records[0] or {}).get("made_by") == json.loads(json.dumps(about)):
            lines = [record for record in records[1:] if record is not None]
            whole = None not in records and content.endswith(b"\n")
    for line in lines:
        kept[line["question"], line["seed"]] = line["text"]
    if not whole:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in ({"made_by": about}, *lines))
        write_text(path, text)
    return kept


def _read_lines(content: bytes) -> list[dict[str, Any] | None]:
    """Each line's record, None for a line that is not whole."""
    records: list[dict[str, Any] | None] = []
    # Not splitlines(): U+2028 and friends are legal inside a JSON string.
    for line in content.split(b"\n"):
        if not line:
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        records.append(record if isinstance(record, dict) else None)
    return records


def _score_answers(
    answers: NDArray[Any],
    rows: Sequence[Row],
    scorers: Sequence[tuple[Scorer, bool]],
    progress: Progress | None,
) -> Scores:
    def load(chunk: Sequence[Index]) -> Inputs:
        shown = {index[2]: [image.open() for image in rows[index[2]].images] for index in chunk}
        of = [rows[index[2]] for index in chunk]
        columns = [{**row.columns, RESPONSES: answers[index]} for row, index in zip(of, chunk, strict=True)]
        return [shown[index[2]] for index in chunk], [row.prompt for row in of], columns

    return score_samples(answers.shape, load, scorers, "answer", progress)
