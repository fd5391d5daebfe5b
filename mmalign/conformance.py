"""`mmalign rewards check SPEC`: does a reward keep the contract? A table of facts, and an exit code.

The reward is loaded as a run would load it and scores renders of the synthetic world, or answers about them, or rows of
your own data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mmalign.reward import RewardError, RewardOutput, Scorer, load_reward

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console
    from rich.table import Table

    from mmalign.config import RewardConfig

NUM_IMAGES = 7
BATCH_SIZES = (1, 2, NUM_IMAGES)
SIZE_PX = 64
# Relative to the largest score (at least 1): float noise of another batch shape stays below, mixed-up rows do not.
BATCH_TOLERANCE = 1e-4
REPEAT_TOLERANCE = 1e-6
UNKNOWN_COLUMN = "mmalign_check_column"


@dataclass(frozen=True)
class Check:
    """One line of the table. `note` is worth knowing and breaks nothing."""

    name: str
    status: Literal["pass", "fail", "note"]
    detail: str


@dataclass(frozen=True)
class _Inputs:
    """For a reward of answers, `images` holds a list of images for each answer and `columns` has `responses`."""

    images: list[Any]
    prompts: list[str]
    columns: list[dict[str, Any]] | None

    def pick(self, index: Sequence[int]) -> _Inputs:
        columns = None if self.columns is None else [self.columns[n] for n in index]
        return _Inputs([self.images[n] for n in index], [self.prompts[n] for n in index], columns)

    def pixels(self) -> list[bytes]:
        return [part.tobytes() for image in self.images for part in (image if isinstance(image, list) else [image])]


def check_reward(
    config: RewardConfig | str,
    *,
    data: str | None = None,
    device: str = "cpu",
    console: Console | None = None,
) -> int:
    """Print the conformance table of a reward; 0 if it keeps the contract, 1 if not.

    Args:
        config: name (or `file.py:Name`) and options.
        data: score the first rows of this data instead of renders; needed where the reward takes columns.
    """
    from rich.console import Console

    checks = run_checks(config, data=data, device=device)
    console = console or Console()
    console.print(checks_table(config if isinstance(config, str) else config.name, checks))
    num_failed = sum(check.status == "fail" for check in checks)
    console.print(f"{num_failed} of {len(checks)} checks failed" if num_failed else "the reward keeps the contract")
    return 1 if num_failed else 0


def run_checks(config: RewardConfig | str, *, data: str | None = None, device: str = "cpu") -> list[Check]:
    """The checks in order. Ends early where the reward cannot be loaded or called at all."""
    try:
        scorer = load_reward(config, device)
    except ValueError as error:
        return [Check("loads", "fail", str(error))]
    checks = [Check("loads", "pass", f"{scorer.name}, fingerprint {scorer.fingerprint}")]
    world = _world_answers if scorer.unit == "answer" else _world_inputs
    inputs = world() if data is None else _data_inputs(data, scorer.unit)
    absent = [key for key in scorer.required_columns if key not in ((inputs.columns or [{}])[0])]
    if absent:
        fix = "give rows that have it with --data FILE" if data is None else f"{data} does not have it"
        return [*checks, Check("columns", "fail", f"the reward needs the column {absent[0]!r}; {fix}")]
    before = inputs.pixels()
    try:
        started = time.perf_counter()
        output = _score(scorer, inputs)
        seconds = time.perf_counter() - started
    except RewardError as error:
        name = {"shape": "shape", "dtype": "dtype", "invalid": "NaN policy"}.get(error.problem, "call")
        return [*checks, Check(name, "fail", str(error))]
    num_images = len(inputs.images)
    unit = scorer.unit
    rate = f"{num_images / seconds:.3g} {unit}s/s on {device}"
    return [
        *checks,
        Check("shape", "pass", f"one number per {unit}, {num_images} of {num_images}; {rate}"),
        Check("dtype", "pass", "real numbers, stored as fp32" + _sub_score_names(output)),
        _check_nan(output, unit),
        *(_check_batch(scorer, inputs, output, size) for size in BATCH_SIZES),
        _check_order(scorer, inputs, output),
        _check_repeat(scorer, inputs, output),
        _check_range(scorer, output),
        _check_prompts(scorer, inputs, output),
        _check_columns(scorer, inputs, output),
        (_check_hard_answers if unit == "answer" else _check_hard_inputs)(scorer, inputs),
        _unchanged(before, inputs),
    ]


def checks_table(name: str, checks: Sequence[Check]) -> Table:
    from rich.table import Table
    from rich.text import Text

    styles = {"pass": "green", "fail": "bold red", "note": "yellow"}
    table = Table(title=Text(f"reward {name}"), title_justify="left")
    for column in ("check", "result", "detail"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(Text(check.name), Text(check.status, style=styles[check.status]), Text(check.detail))
    return table


def _world_inputs() -> _Inputs:
    import numpy as np
    from PIL import Image

    from mmalign.synthetic.render import render
    from mmalign.synthetic.scenes import captions, sample_scenes

    prompts = [*captions("attributes", "train")[: NUM_IMAGES - 2], *captions("relations", "train")[:2]]
    pixels_NHWC = render(sample_scenes(prompts, np.random.default_rng(0)), SIZE_PX)
    return _Inputs([Image.fromarray(pixels_HWC) for pixels_HWC in pixels_NHWC], prompts, None)


def _world_answers() -> _Inputs:
    """True answers and, every second time, the next question's."""
    from PIL import Image

    from mmalign.synthetic.questions import evaluation_questions

    questions = evaluation_questions("train", NUM_IMAGES, 0)
    columns = [
        {"truth": question.truth, "kind": question.kind, "responses": questions[(n + n % 2) % NUM_IMAGES].truth}
        for n, question in enumerate(questions)
    ]
    images = [[Image.fromarray(pixels_HWC) for pixels_HWC in question.images] for question in questions]
    return _Inputs(images, [question.prompt for question in questions], columns)


def _data_inputs(data: str, unit: Literal["image", "answer"]) -> _Inputs:
    from mmalign.scoring import read_items

    found: list[tuple[Any, str, dict[str, Any]]] = []
    for item in read_items(data):
        if unit == "answer" and item.response is not None:
            shown = [image.open() for image in item.shown]
            found.append((shown, item.prompt, {**item.columns, "responses": item.response}))
        elif unit == "image" and item.image is not None:
            found.append((item.image.open(), item.prompt, dict(item.columns)))
        if len(found) == NUM_IMAGES:
            break
    if len(found) < 2:
        raise ValueError(f"{data}: {len(found)} usable {unit}s; the check needs at least 2, better {NUM_IMAGES}")
    images, prompts, columns = (list(part) for part in zip(*found, strict=True))
    return _Inputs(images, prompts, columns)


def _score(scorer: Scorer, inputs: _Inputs, *, require_valid: bool = True) -> RewardOutput:
    return scorer.score(inputs.images, inputs.prompts, inputs.columns, require_valid=require_valid)


def _sub_score_names(output: RewardOutput) -> str:
    return f"; sub-scores {', '.join(output.sub_scores)}" if output.sub_scores else ""


def _check_nan(output: RewardOutput, unit: str) -> Check:
    values = output.scores.tolist()
    reasons = sorted({reason for reason in output.errors or [] if reason})
    if reasons:
        invalid = sum(math.isnan(value) for value in values)
        return Check(
            "NaN policy", "note", f"{invalid} of {len(values)} {unit}s without a score: {'; '.join(reasons[:3])}"
        )
    if len(values) > 1 and len(set(values)) == 1:
        return Check(
            "NaN policy", "note", f"all {len(values)} {unit}s got {values[0]:g}; a stand-in value? use None or NaN"
        )
    return Check("NaN policy", "pass", f"all {len(values)} {unit}s scored, mean {sum(values) / len(values):.4g}")


def _difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """(largest difference, largest absolute score or 1). A score on one side only is an infinite difference."""
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        if math.isnan(a) != math.isnan(b):
            worst = math.inf
        elif not math.isnan(a):
            worst = max(worst, abs(a - b))
    return worst, max([1.0, *(abs(value) for value in [*first, *second] if not math.isnan(value))])


def _compare(
    name: str, what: str, first: Sequence[float], second: Sequence[float], tolerance: float, fix: str
) -> Check:
    worst, magnitude = _difference(first, second)
    if worst <= tolerance * magnitude:
        return Check(name, "pass", f"{what}: largest difference {worst:.2g}")
    return Check(name, "fail", f"{what}: scores differ by {worst:.3g}; {fix}")


def _attempt(name: str, call: Any) -> Check:
    """A check whose own call of the reward may break the contract."""
    try:
        return call()
    except RewardError as error:
        return Check(name, "fail", str(error))


def _check_batch(scorer: Scorer, inputs: _Inputs, output: RewardOutput, size: int) -> Check:
    name = f"batch of {size}"

    def check() -> Check:
        scores: list[float] = []
        for start in range(0, len(inputs.images), size):
            chunk = inputs.pick(range(start, min(start + size, len(inputs.images))))
            scores += _score(scorer, chunk, require_valid=False).scores.tolist()
        if size == NUM_IMAGES:
            singles = [
                _score(scorer, inputs.pick([n]), require_valid=False).scores.item() for n in range(len(inputs.images))
            ]
            return _compare(name, "against one by one", scores, singles, BATCH_TOLERANCE, _BATCH_FIX)
        return _compare(name, "against all at once", scores, output.scores.tolist(), BATCH_TOLERANCE, _BATCH_FIX)

    return _attempt(name, check)


_BATCH_FIX = "a score must not depend on the others of its batch (padding, batch norm, normalising over the batch)"


def _check_order(scorer: Scorer, inputs: _Inputs, output: RewardOutput) -> Check:
    def check() -> Check:
        reverse = inputs.pick(range(len(inputs.images) - 1, -1, -1))
        scores = _score(scorer, reverse, require_valid=False).scores.tolist()[::-1]
        fix = f"the i-th score must belong to the i-th {scorer.unit}"
        return _compare("order", "reversed", scores, output.scores.tolist(), BATCH_TOLERANCE, fix)

    return _attempt("order", check)


def _check_repeat(scorer: Scorer, inputs: _Inputs, output: RewardOutput) -> Check:
    def check() -> Check:
        scores = _score(scorer, inputs, require_valid=False).scores.tolist()
        fix = "eval mode (dropout off)? temperature 0? own seeded generator?"
        return _compare("determinism", "same call twice", scores, output.scores.tolist(), REPEAT_TOLERANCE, fix)

    return _attempt("determinism", check)


def _check_range(scorer: Scorer, output: RewardOutput) -> Check:
    values = [value for value in output.scores.tolist() if not math.isnan(value)]
    seen = f"{min(values):.4g} … {max(values):.4g}"
    if scorer.range is None:
        return Check("declared range", "note", f"none declared; seen {seen}. Declare `range = (low, high)`")
    low, high = scorer.range
    inside = low <= min(values) and max(values) <= high
    return Check("declared range", "pass" if inside else "fail", f"declared {low:.4g} … {high:.4g}, seen {seen}")


def _check_prompts(scorer: Scorer, inputs: _Inputs, output: RewardOutput) -> Check:
    if not scorer.takes_prompts:
        return Check("prompts", "pass", "not a parameter")

    def check() -> Check:
        rotated = _Inputs(inputs.images, inputs.prompts[1:] + inputs.prompts[:1], inputs.columns)
        scores = _score(scorer, rotated, require_valid=False).scores.tolist()
        depends = _difference(scores, output.scores.tolist())[0] > 0
        says = "scores change with the prompt" if depends else "scores do not change with the prompt"
        declared = scorer.declares_prompt
        if declared is None:
            return Check("prompts", "note", f"{says}; declare `needs_prompt = {depends}`")
        return Check("prompts", "pass" if declared == depends else "fail", f"needs_prompt = {declared}, {says}")

    return _attempt("prompts", check)


def _check_columns(scorer: Scorer, inputs: _Inputs, output: RewardOutput) -> Check:
    takes = "all (**columns)" if scorer.takes_all_columns else ", ".join(scorer.columns) or "none"

    def check() -> Check:
        base: Sequence[Mapping[str, Any]] = inputs.columns or [{} for _ in inputs.images]
        columns = [{**row, UNKNOWN_COLUMN: n} for n, row in enumerate(base)]
        scores = _score(scorer, _Inputs(inputs.images, inputs.prompts, columns), require_valid=False).scores.tolist()
        fix = "a column that it does not know must not change its scores"
        return _compare(
            "columns", f"takes {takes}; with an unknown column", scores, output.scores.tolist(), BATCH_TOLERANCE, fix
        )

    return _attempt("columns", check)


def _check_hard_inputs(scorer: Scorer, inputs: _Inputs) -> Check:
    """Odd but valid inputs, one at a time: a score or None, never an exception that would end a run."""
    from PIL import Image

    cases: list[tuple[str, Image.Image, str]] = [
        ("a black image", Image.new("RGB", (SIZE_PX, SIZE_PX)), inputs.prompts[0]),
        ("a wide image", Image.new("RGB", (3 * SIZE_PX, SIZE_PX), (200, 30, 30)), inputs.prompts[0]),
        ("a 300-word prompt", inputs.images[0], " ".join(["a red circle and"] * 75)),
        ("an empty prompt", inputs.images[0], ""),
        ("a prompt in another script", inputs.images[0], "一个红色的圆 🔴 «круг»"),
    ]
    columns = None if inputs.columns is None else inputs.columns[:1]
    return _score_each(scorer, [(name, _Inputs([image], [prompt], columns)) for name, image, prompt in cases])


def _check_hard_answers(scorer: Scorer, inputs: _Inputs) -> Check:
    assert inputs.columns is not None
    images, prompts, columns = inputs.images[:1], inputs.prompts[:1], inputs.columns[0]
    texts = {
        "an empty answer": "",
        "a 300-word answer": " ".join(["a red circle and"] * 75),
        "an answer in another script": "一个红色的圆 🔴 «круг»",
    }
    cases = [(name, _Inputs(images, prompts, [{**columns, "responses": text}])) for name, text in texts.items()]
    return _score_each(scorer, [*cases, ("a question without images", _Inputs([[]], prompts, [columns]))])


def _score_each(scorer: Scorer, cases: Sequence[tuple[str, _Inputs]]) -> Check:
    unscored = []
    for name, inputs in cases:
        try:
            output = _score(scorer, inputs, require_valid=False)
        except RewardError as error:
            return Check("hard inputs", "fail", f"{name}: {error}")
        if math.isnan(output.scores.item()):
            unscored.append(name)
    detail = f"without a score: {', '.join(unscored)}" if unscored else f"all {len(cases)} scored"
    return Check("hard inputs", "pass", detail)


def _unchanged(before: list[bytes], inputs: _Inputs) -> Check:
    changed = [n for n, pixels in enumerate(inputs.pixels()) if pixels != before[n]]
    if changed:
        return Check("images", "fail", f"the reward changed image {changed[0]} in place; work on image.copy()")
    return Check("images", "pass", "left unchanged")
