"""The evidence a comparison leaves behind: `report.json` for programs and `report.html` for people.

The page is one file that asks nothing of the network: images are embedded (tiny ones as they are, large ones reduced
under a byte budget), decoded when scrolled to, and every view of it has an address (`#sort=clip&filter=red`).

Shape legend: L models (0 is the baseline), G guidance scales, P prompts, S seeds.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from mmalign.evaluation.files import write_text
from mmalign.evaluation.grid import format_score
from mmalign.evaluation.statistics import Comparison, paired_comparison

# Images of this size or less are embedded as they are: lossless, and smaller than any JPEG of useful quality.
EMBED_AS_IS_PX = 128
EMBED_SIDES_PX = (1024, 768, 512, 384, 256)
EMBED_BUDGET_BYTES = 64 * 2**20
JPEG_BYTES_PER_PIXEL = 0.25


@dataclass(frozen=True)
class RewardInfo:
    """A line of the summary.

    Args:
        parent: the reward this is a sub-score of, None for a reward itself.
        trained_on: training used this reward; its gain shows that training worked, not that images got better.
        n_invalid: images without a valid score; `first_error` is the first reason given.
    """

    name: str
    trained_on: bool = False
    parent: str | None = None
    higher_is_better: bool = True
    n_invalid: int = 0
    first_error: str | None = None


@dataclass(frozen=True)
class Entry:
    """`label` compared with the baseline `versus` under one reward at one guidance scale."""

    reward: RewardInfo
    label: str
    versus: str
    guidance_scale: float
    comparison: Comparison


@dataclass(frozen=True)
class Report:
    """Everything an evaluation found.

    Args:
        labels: L model names; the first is the baseline that all others are compared with.
        scores: reward or sub-score name -> `[L, G, P, S]`, NaN = invalid.
        images: `[L, G, P, S]` paths of the samples.
        identical_noise: for each prompt and seed all models started from the same initial noise.
        details: run information to show, e.g. ("checkpoint", "step 2000").
    """

    title: str
    labels: tuple[str, ...]
    models: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    guidance_scales: tuple[float, ...]
    num_steps: int
    identical_noise: bool
    rewards: tuple[RewardInfo, ...]
    scores: Mapping[str, NDArray[np.float64]]
    images: NDArray[Any] = field(repr=False)
    details: tuple[tuple[str, str], ...] = ()
    entries: tuple[Entry, ...] = ()

    def comparison(
        self, reward: str | None = None, *, label: str | None = None, guidance_scale: float | None = None
    ) -> Comparison:
        """One comparison; by default of the first reward, first tuned model and first guidance scale.

        Raises `ValueError` naming what was compared.
        """
        for entry in self.entries:
            if (
                reward in (None, entry.reward.name)
                and label in (None, entry.label)
                and guidance_scale in (None, entry.guidance_scale)
            ):
                return entry.comparison
        known = ", ".join(sorted({entry.reward.name for entry in self.entries})) or "none"
        raise ValueError(
            f"no comparison for reward {reward!r}, model {label!r}, guidance scale {guidance_scale!r}. "
            f"Rewards: {known}; models: {', '.join(self.labels[1:])}; "
            f"guidance scales: {', '.join(map(str, self.guidance_scales))}"
        )

    @property
    def noise_line(self) -> str:
        if self.identical_noise:
            return "Identical initial noise: for each prompt and seed all images start from the same noise."
        return "Same seeds, but models of different kind or resolution: their initial noise is not identical."

    @property
    def headline(self) -> str:
        """The first reward's result in words, the interval's verdict included."""
        main = [entry for entry in self.headline_entries() if entry.reward.parent is None]
        if not main:
            return "No reward was given: compare the images by eye."
        first = main[0]
        result = first.comparison
        if result.n_valid == 0:
            return f"{first.reward.name} gave no valid score for any pair, so nothing can be said."
        verb = {"better": "beats", "worse": "loses to", "undecided": "shows no clear difference from"}[result.verdict]
        text = (
            f"{first.label} {verb} {first.versus} on {first.reward.name}: win rate {_percent(result)}, "
            f"mean {format_score(result.mean_before)} → {format_score(result.mean_after)}, over {result.n_prompts} "
            f"prompt{'s' * (result.n_prompts != 1)} × {result.n_seeds} seed{'s' * (result.n_seeds != 1)} at guidance "
            f"{first.guidance_scale:g}."
        )
        if first.reward.trained_on:
            held_out = [entry for entry in main if not entry.reward.trained_on and entry.comparison.n_valid]
            text += " Training used this reward."
            if held_out:
                parts = (f"{entry.reward.name} {_percent(entry.comparison)}" for entry in held_out)
                text += f" Held out of training: {'; '.join(parts)}."
        return text

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader must know before believing the headline."""
        found = []
        main = [entry for entry in self.headline_entries() if entry.reward.parent is None]
        rose = [e.reward.name for e in main if e.reward.trained_on and e.comparison.verdict == "better"]
        fell = [e.reward.name for e in main if not e.reward.trained_on and e.comparison.verdict == "worse"]
        if rose and fell:
            found.append(
                f"{', '.join(rose)} rose in training while {', '.join(fell)}, held out of training, fell: "
                "look for reward hacking."
            )
        total = int(np.prod(self.images.shape))
        for reward in self.rewards:
            if reward.n_invalid and reward.parent is None:
                reason = f" First reason: {reward.first_error}" if reward.first_error else ""
                found.append(f"{reward.name} has no valid score for {reward.n_invalid} of {total} images.{reason}")
        return tuple(found)

    def headline_entries(self) -> list[Entry]:
        """First tuned model, first guidance scale: one entry per reward and sub-score."""
        return [e for e in self.entries if e.label == self.labels[1] and e.guidance_scale == self.guidance_scales[0]]

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "headline": self.headline,
            "warnings": list(self.warnings),
            "labels": list(self.labels),
            "models": list(self.models),
            "guidance_scales": list(self.guidance_scales),
            "num_steps": self.num_steps,
            "num_prompts": len(self.prompts),
            "seeds": list(self.seeds),
            "identical_noise": self.identical_noise,
            "details": dict(self.details),
            "rewards": {entry.reward.name: entry_json(entry) for entry in self.headline_entries()},
            "comparisons": [{"reward": entry.reward.name, **entry_json(entry)} for entry in self.entries],
        }


def compare_scores(
    rewards: Sequence[RewardInfo],
    scores: Mapping[str, NDArray[np.float64]],
    labels: Sequence[str],
    guidance_scales: Sequence[float],
) -> tuple[Entry, ...]:
    """Every model against the first, for every reward and guidance scale."""
    return tuple(
        Entry(
            reward,
            label,
            labels[0],
            scale,
            paired_comparison(
                scores[reward.name][0, g], scores[reward.name][index, g], higher_is_better=reward.higher_is_better
            ),
        )
        for index, label in enumerate(labels)
        if index > 0
        for reward in rewards
        for g, scale in enumerate(guidance_scales)
    )


def entry_json(entry: Entry) -> dict[str, Any]:
    return {
        "label": entry.label,
        "versus": entry.versus,
        "guidance_scale": entry.guidance_scale,
        "trained_on": entry.reward.trained_on,
        "parent": entry.reward.parent,
        "higher_is_better": entry.reward.higher_is_better,
        "verdict": entry.comparison.verdict,
        **_plain(asdict(entry.comparison)),
    }


def write_report(report: Report, folder: Path, *, embed_budget: int = EMBED_BUDGET_BYTES) -> None:
    """`report.json`, `scores.jsonl` (a line for each image) and `report.html`, each complete or absent."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(line, ensure_ascii=False, allow_nan=False) for line in score_lines(report, folder))
    write_text(folder / "scores.jsonl", "".join(line + "\n" for line in lines))
    write_text(folder / "report.html", render_html(report, folder, embed_budget=embed_budget))
    # Last: whoever finds report.json finds the other two as well.
    write_text(
        folder / "report.json", json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )


def score_lines(report: Report, folder: Path) -> Iterator[dict[str, Any]]:
    for index in np.ndindex(report.images.shape):
        model, scale, prompt, seed = index
        yield {
            "prompt": report.prompts[prompt],
            "seed": report.seeds[seed],
            "label": report.labels[model],
            "guidance_scale": report.guidance_scales[scale],
            "path": _relative(report.images[index], folder),
            "scores": {reward.name: _plain(float(report.scores[reward.name][index])) for reward in report.rewards},
        }


def render_html(report: Report, folder: Path, *, embed_budget: int = EMBED_BUDGET_BYTES) -> str:
    """The page. Image addresses beyond `embed_budget` bytes are relative to `folder`."""
    from jinja2 import Environment, StrictUndefined

    # Autoescape for the markup, `tojson` (which escapes <, >, & and ') for the data: prompts are anyone's text.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["score"] = format_score
    environment.globals["isfinite"] = math.isfinite
    template = environment.from_string(
        package_files("mmalign.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    )
    image_sets, num_linked, native_px = _embed(report, folder, embed_budget)
    data = {
        "labels": report.labels,
        "seeds": report.seeds,
        "guidance": report.guidance_scales,
        "rewards": [
            {"name": r.name, "trained": r.trained_on, "parent": r.parent, "sign": 1 if r.higher_is_better else -1}
            for r in report.rewards
        ],
        "prompts": [
            {"text": text, "scores": [_plain(report.scores[r.name][:, :, index].round(6)) for r in report.rewards]}
            for index, text in enumerate(report.prompts)
        ],
        "nativePx": native_px,
    }
    nonce = hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=12).hexdigest()
    return template.render(report=report, data=data, image_sets=image_sets, num_linked=num_linked, nonce=nonce)


def _embed(report: Report, folder: Path, budget: int) -> tuple[list[list[str]], int, int]:
    """For each prompt its image addresses in the order [L, G, S]; how many are links; the largest side in pixels."""
    from PIL import Image

    num_models, num_scales, num_prompts, num_seeds = report.images.shape
    native_px = 1
    for path in report.images[:, 0, 0, 0]:
        with Image.open(path) as image:
            native_px = max(native_px, *image.size)
    total = report.images.size
    affordable = (side for side in EMBED_SIDES_PX if side**2 * JPEG_BYTES_PER_PIXEL * total <= budget)
    side = next(affordable, EMBED_SIDES_PX[-1])
    image_sets, spent, num_linked = [], 0, 0
    for prompt in range(num_prompts):
        addresses = []
        for model, scale, seed in np.ndindex(num_models, num_scales, num_seeds):
            path = report.images[model, scale, prompt, seed]
            address = data_uri(path, side) if spent < budget else ""
            if not address or spent + len(address) > budget:
                address = quote(_relative(path, folder))
                num_linked += 1
                spent = budget
            else:
                spent += len(address)
            addresses.append(address)
        image_sets.append(addresses)
    return image_sets, num_linked, native_px


def data_uri(path: Path, max_side: int) -> str:
    """The image file as it is when tiny, else as a JPEG no larger than `max_side`."""
    from PIL import Image

    with Image.open(path) as image:
        if max(image.size) <= EMBED_AS_IS_PX and image.format == "PNG":
            return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        picture = image.convert("RGB")
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=88, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _percent(result: Comparison) -> str:
    low, high = result.interval
    return f"{100 * result.win_rate:.0f} % (95 % interval {100 * low:.0f}–{100 * high:.0f} %)"


def _plain(value: Any) -> Any:
    """For JSON: arrays and tuples as lists, NaN and infinity as null."""
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
