"""Preview grids while training: a few fixed prompts, one seed, always the same noise."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from mmalign.config import EvaluateConfig
from mmalign.evaluation.compare import read_prompts
from mmalign.evaluation.grid import Cell, Column, save_grid
from mmalign.policies.base import View


def draw_preview(policy: Any, config: EvaluateConfig, view: View, path: Path, label: str) -> None:
    """Base beside the current weights, at the first evaluation guidance scale; the base is drawn once per run."""
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
            path.parent.mkdir(parents=True, exist_ok=True)
            for sample, file in zip(samples, kept, strict=True):
                sample.image.save(file)
        columns.append(Column(name, [Cell(sample.image) for sample in samples]))
    save_grid(path, prompts, columns, title=label, lines=[f"guidance {guidance:g}, {num_steps} steps"])


def _short_hash(*parts: str) -> str:
    return hashlib.blake2b("\x1e".join(parts).encode(), digest_size=6).hexdigest()
