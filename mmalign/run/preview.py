"""Previews while training: a few fixed prompts or questions, one seed, always the same noise."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mmalign.config import EvaluateConfig
from mmalign.policies.base import View
from mmalign.run import atomic


def draw_preview(policy: Any, config: EvaluateConfig, view: View, path: Path, label: str) -> None:
    """Base beside the current weights; the base is sampled once per run."""
    assert config.prompts is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    (_draw_answers if policy.modality == "text" else _draw_images)(policy, config, view, path, label)


def _draw_images(policy: Any, config: EvaluateConfig, view: View, path: Path, label: str) -> None:
    """At the first evaluation guidance scale."""
    from mmalign.evaluation.grid import Cell, Column, save_grid
    from mmalign.evaluation.prompts import read_prompts

    assert config.prompts is not None
    prompts = read_prompts(config.prompts, config.preview_prompts)
    guidance = config.guidance_scale[0] if config.guidance_scale else policy.default_guidance_scale
    num_steps = config.num_steps or policy.default_num_steps
    settings = f"{guidance}\x1f{num_steps}\x1f{policy.resolution}"
    kept = [path.parent / f"base_{_short_hash(prompt, settings)}.png" for prompt in prompts]
    columns = []
    for name, shown in (("base", "reference"), (label, view)):
        if name == "base" and all(file.is_file() for file in kept):
            columns.append(Column(name, [Cell(file) for file in kept]))
            continue
        with policy.view(shown):
            samples = policy.sample(prompts, [0] * len(prompts), guidance_scale=guidance, num_steps=num_steps)
        if name == "base":
            for sample, file in zip(samples, kept, strict=True):
                sample.image.save(file)
        columns.append(Column(name, [Cell(sample.image) for sample in samples]))
    save_grid(path, prompts, columns, title=label, lines=[f"guidance {guidance:g}, {num_steps} steps"])


def _draw_answers(policy: Any, config: EvaluateConfig, view: View, path: Path, label: str) -> None:
    from mmalign.data.questions import read_questions
    from mmalign.evaluation.answer_grid import AnswerRow, changed_spans, save_answer_grid
    from mmalign.evaluation.answer_report import question_text, truth_text

    assert config.prompts is not None
    rows = read_questions(config.prompts, config.preview_prompts)

    def ask(shown: View) -> list[str]:
        with policy.view(shown):
            made = policy.answer(
                rows, [0] * len(rows), temperature=config.temperature, max_new_tokens=config.max_new_tokens
            )
        return [answer.text for answer in made]

    settings = f"{config.temperature}\x1f{config.max_new_tokens}"
    parts = (part for row in rows for part in (row.id, row.prompt, *(image.digest() for image in row.images)))
    kept = path.parent / f"base_{_short_hash(settings, *parts)}.json"
    if kept.is_file():
        base = json.loads(kept.read_text(encoding="utf-8"))
    else:
        base = ask("reference")
        atomic.write_text(kept, json.dumps(base, ensure_ascii=False))
    shown = [
        AnswerRow(question_text(row), row.images, (before, now), truth_text(row), changed_spans([before, now]))
        for row, before, now in zip(rows, base, ask(view), strict=True)
    ]
    how = f"temperature {config.temperature:g}" if config.temperature else "greedy"
    save_answer_grid(path, shown, ("base", label), title=label, lines=[f"{how}. Shaded: words that differ."])


def _short_hash(*parts: str) -> str:
    return hashlib.blake2b("\x1e".join(parts).encode(), digest_size=6).hexdigest()
