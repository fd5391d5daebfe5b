"""Before and after: sample the same prompts from the same noise with several weights, score them, write the evidence.

Samples go to disk as they are made and are read back in small groups for scoring, so memory does not grow with the
number of prompts, and a repeated evaluation reuses every image whose model and settings have not changed.

Shape legend: L models (0 is the baseline), G guidance scales, P prompts, S seeds.
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

from mmalign.evaluation.drawing import CellScore
from mmalign.evaluation.files import replacing, slug, write_text
from mmalign.evaluation.grid import Cell, Column, save_grid
from mmalign.evaluation.image_report import ImageReport
from mmalign.evaluation.prompts import PromptRow, read_prompt_rows, read_prompts
from mmalign.evaluation.report import compare_scores, write_report
from mmalign.evaluation.scores import Index, Inputs, Progress, Scores, check_units, score_samples

if TYPE_CHECKING:
    from mmalign.config import EvaluateConfig
    from mmalign.policies.base import Policy, View
    from mmalign.reward import Scorer

MAX_GRID_IMAGES_PER_ROW = 6
MAX_GRID_SCORES = 4
ABOUT = "about.json"


def evaluate(
    policy: Policy,
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
) -> ImageReport:
    """Compare two views of one policy.

    Args:
        scorers: (reward, whether training used it), in the order of the report; the first makes the headline.
        folder: gets `grid.png`, `report.html`, `report.json`, `scores.jsonl` and `samples/VIEW/gSCALE/*.png`.
        details: run information for the header, e.g. {"checkpoint": "step 2000"}.
        samples: another folder for the images, so that several evaluations share the baseline's.

    Raises `ValueError` if `config.prompts` is unset or unusable, or a reward fails for all images.
    """
    models = [(labels[0], policy, before), (labels[1], policy, after)]
    return _compare(models, [before, after], config, scorers, folder, title, details, samples, progress)


def compare_models(
    models: Iterable[tuple[str, Policy, View]],
    config: EvaluateConfig,
    scorers: Sequence[tuple[Scorer, bool]],
    folder: Path,
    *,
    title: str = "Comparison",
    details: Mapping[str, str] | None = None,
    samples: Path | None = None,
    progress: Progress | None = None,
) -> ImageReport:
    """Compare any number of models with the first.

    Args:
        models: (label, policy, view). May be a generator: each policy is sampled from before the next is asked for,
            so models that do not fit into memory together can be loaded one at a time. Unset sampling settings
            (guidance scale, steps) are the first model's, for all.

    The other arguments are those of `evaluate`; images lie in `samples/LABEL/gSCALE/`.
    """
    return _compare(models, None, config, scorers, folder, title, details, samples, progress)


@dataclass(frozen=True)
class _Plan:
    """What to sample, the same for every model."""

    rows: Sequence[PromptRow]
    seeds: Sequence[int]
    guidance_scales: Sequence[float]
    num_steps: int
    batch_size: int


def _compare(
    models: Iterable[tuple[str, Policy, View]],
    folder_names: Sequence[str] | None,
    config: EvaluateConfig,
    scorers: Sequence[tuple[Scorer, bool]],
    folder: Path,
    title: str,
    details: Mapping[str, str] | None,
    samples: Path | None,
    progress: Progress | None,
) -> ImageReport:
    if config.prompts is None:
        raise ValueError("evaluate.prompts is not set; give a prompt file or builtin:attributes_heldout")
    check_units([scorer for scorer, _ in scorers], "image")
    rows, num_repeated = _unique(read_prompt_rows(config.prompts, config.limit))
    sample_root = samples or folder / "samples"
    plan: _Plan | None = None
    labels: list[str] = []
    names: list[str] = []
    kinds: set[tuple[type, int]] = set()
    image_paths: list[NDArray[Any]] = []
    for label, policy, view in models:
        if label in labels:
            raise ValueError(f"two models are both called {label!r}; give each its own label")
        if plan is None:
            scales = tuple(config.guidance_scale) or (policy.default_guidance_scale,)
            num_steps = config.num_steps or policy.default_num_steps
            plan = _Plan(rows, tuple(range(config.seeds)), scales, num_steps, config.batch_size)
        name = folder_names[len(labels)] if folder_names else f"{len(labels)}-{slug(label)}"
        image_paths.append(_sample_model(policy, view, plan, sample_root / name, f"sample {label}", progress))
        labels.append(label)
        names.append(policy.name)
        kinds.add((type(policy), policy.resolution))
        # The loop variable must not keep this model alive while a generator loads the next one.
        del policy
    if plan is None or len(labels) < 2:
        raise ValueError(f"a comparison needs at least two models, got {len(labels)}")
    images = np.stack(image_paths)
    scores = _score_images(images, rows, scorers, progress)
    shown = [("model", " · ".join(dict.fromkeys(names))), *(details or {}).items()]
    if num_repeated:
        shown.append(("repeated prompts left out", str(num_repeated)))
    report = ImageReport(
        title=title,
        labels=tuple(labels),
        models=tuple(names),
        prompts=tuple(row.prompt for row in rows),
        seeds=tuple(plan.seeds),
        guidance_scales=tuple(float(scale) for scale in plan.guidance_scales),
        num_steps=plan.num_steps,
        identical_noise=len(kinds) == 1,
        rewards=scores.rewards,
        scores=scores.values,
        images=images,
        details=tuple((str(key), str(value)) for key, value in shown),
    )
    report = replace(report, entries=compare_scores(scores.rewards, scores.values, labels, report.guidance_scales))
    write_grid(report, folder / "grid.png", config.grid_prompts)
    write_report(report, folder)
    return report


def _unique(rows: Sequence[PromptRow]) -> tuple[list[PromptRow], int]:
    """Each prompt once. The noise depends on (prompt, seed) alone, so a repeated prompt is the same images again and
    would only make the interval too narrow."""
    by_prompt: dict[str, PromptRow] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt, row)
    return list(by_prompt.values()), len(rows) - len(by_prompt)


def _sample_model(
    policy: Policy, view: View, plan: _Plan, folder: Path, phase: str, progress: Progress | None
) -> NDArray[Any]:
    """Paths `[G, P, S]` of one model's images; those already there from the same weights and settings are kept."""
    shape = (len(plan.guidance_scales), len(plan.rows), len(plan.seeds))
    paths: NDArray[Any] = np.empty(shape, dtype=object)
    jobs = [(p, s) for p in range(shape[1]) for s in range(shape[2])]
    done, total = 0, len(jobs) * shape[0]
    with policy.view(view):
        weights = weights_fingerprint(policy, view)
        for g, scale in enumerate(plan.guidance_scales):
            target = folder / f"g{scale:g}"
            for p, s in jobs:
                paths[g, p, s] = target / _file_name(plan.rows[p].prompt, plan.seeds[s])
            about = {
                "model": policy.name,
                "view": view,
                "weights": weights,
                "encoders": [policy.encode_key("prompt"), policy.encode_key("image")],
                "resolution": policy.resolution,
                "guidance_scale": scale,
                "num_steps": plan.num_steps,
            }
            _claim(target, about, [(paths[g, p, s].name, plan.rows[p].prompt, plan.seeds[s]) for p, s in jobs])
            for start in range(0, len(jobs), plan.batch_size):
                batch = jobs[start : start + plan.batch_size]
                # A batch is made whole or not at all: the same batches on every side keep equal weights bit-equal.
                if not all(paths[g, p, s].is_file() for p, s in batch):
                    made = policy.sample(
                        [plan.rows[p].prompt for p, _ in batch],
                        [plan.seeds[s] for _, s in batch],
                        guidance_scale=scale,
                        num_steps=plan.num_steps,
                    )
                    for (p, s), sample in zip(batch, made, strict=True):
                        with replacing(paths[g, p, s]) as temporary:
                            sample.image.save(temporary, format="PNG")
                done += len(batch)
                if progress:
                    progress(phase, done, total)
    return paths


def _claim(folder: Path, about: Mapping[str, Any], images: Sequence[tuple[str, str, int]]) -> None:
    """Make `folder` belong to `about`: images of other weights or settings are removed before the new note is written,
    so an image that lies there is always what the note says."""
    note = folder / ABOUT
    listed = {name: {"prompt": prompt, "seed": seed} for name, prompt, seed in images}
    known: dict[str, Any] = {}
    if note.is_file():
        try:
            known = json.loads(note.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            known = {}
    if known.get("made_by") == json.loads(json.dumps(about)):
        listed = {**known.get("images", {}), **listed}
    else:
        for name in {*known.get("images", {}), *listed}:
            (folder / Path(name).name).unlink(missing_ok=True)
    write_text(note, json.dumps({"made_by": about, "images": listed}, indent=1, ensure_ascii=False) + "\n")


def weights_fingerprint(policy: Policy, view: View) -> str:
    """Identity of the weights that the current view samples with: a checksum and a strided probe of every tensor.

    The reference is the network without its trained adapter, so that training a LoRA keeps the base's images valid.
    """
    import torch

    digest = hashlib.blake2b(digest_size=16)
    # By address: an adapter stacked frozen below the trained one has the same kind of name and is part of the base.
    adapter = {tensor.data_ptr() for name, tensor in policy.trainable() if "lora_" in name}
    named = [
        (f"{role}.{name}", tensor)
        for role, module in policy.modules().items()
        for name, tensor in module.state_dict().items()
        if view != "reference" or tensor.data_ptr() not in adapter
    ]
    for name, tensor in sorted(named, key=lambda item: item[0]):
        flat = tensor.detach().reshape(-1)
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if flat.numel() and not tensor.is_meta:
            probe = flat[:: max(1, flat.numel() // 256)][:256].to("cpu", torch.float64)
            digest.update(probe.numpy().tobytes())
            # Six digits: another number of threads adds up in another order.
            digest.update(f"{flat.float().sum().item():.5e}".encode())
    return digest.hexdigest()


def _score_images(
    images: NDArray[Any],
    rows: Sequence[PromptRow],
    scorers: Sequence[tuple[Scorer, bool]],
    progress: Progress | None,
) -> Scores:
    def load(chunk: Sequence[Index]) -> Inputs:
        of = [rows[index[2]] for index in chunk]
        return [_load(images[index]) for index in chunk], [row.prompt for row in of], [row.columns for row in of]

    return score_samples(images.shape, load, scorers, "image", progress)


def write_grid(report: ImageReport, path: Path, num_prompts: int) -> None:
    """The first prompts (not picked) at the first guidance scale, as many seeds as fit side by side."""
    shown = min(num_prompts, len(report.prompts))
    num_seeds = max(1, min(len(report.seeds), MAX_GRID_IMAGES_PER_ROW // len(report.labels)))
    rewards = [reward for reward in report.rewards if reward.parent is None][:MAX_GRID_SCORES]
    columns = []
    for s in range(num_seeds):
        for model, label in enumerate(report.labels):
            cells = []
            for p in range(shown):
                lines = []
                for reward in rewards:
                    values = report.scores[reward.name][:, 0, p, s]
                    gain = None if model == 0 else float(values[model] - values[0])
                    good = None if not gain else (gain > 0) == reward.higher_is_better
                    lines.append(CellScore(reward.name, float(values[model]), gain, good))
                cells.append(Cell(report.images[model, 0, p, s], lines))
            columns.append(Column(label, cells, f"seed {report.seeds[s]}"))
    settings = f"guidance {report.guidance_scales[0]:g} · {report.num_steps} steps"
    about = " · ".join([*(f"{key} {value}" for key, value in report.details), settings])
    gains = f"Gains over {report.labels[0]} in green, losses in red." if rewards else ""
    save_grid(
        path, report.prompts[:shown], columns, title=report.title, lines=[about, f"{report.noise_line} {gains}".strip()]
    )


def _file_name(prompt: str, seed: int) -> str:
    digest = hashlib.blake2b(prompt.encode(), digest_size=5).hexdigest()
    return f"{slug(prompt, 32)}-{digest}-s{seed}.png"


def _load(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


__all__ = ["compare_models", "evaluate", "read_prompts", "weights_fingerprint", "write_grid"]
