"""Checks of a reward: what its signature accepts, what it declares, and what it returned.

Every message names the reward, what came and what is expected. Shape legend: N images, or N answers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Number, Real
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

Problem = Literal["exception", "shape", "dtype", "invalid"]
MARK_KINDS = ("hallucinated", "wrong", "right")


class RewardError(ValueError):
    """A reward that failed or broke the contract. The message names the reward; `problem` says which part it broke."""

    def __init__(self, message: str, problem: Problem = "exception") -> None:
        super().__init__(message)
        self.problem = problem


@dataclass(frozen=True)
class RewardOutput:
    """What a reward may return instead of plain scores, and what `Scorer.score` always returns.

    Args:
        scores: N numbers. From a reward: list (None = invalid), array or tensor. From a scorer: fp32 CPU tensor [N],
            NaN = invalid.
        sub_scores: named parts of the score, each like `scores`; they get their own lines in reports.
        errors: N reasons, None where there is a score.
        marks: for answers, N lists of (start, end, kind): words to point out, as character positions in the answer.
            Kinds: `hallucinated`, `wrong`, `right`.
    """

    scores: Any
    sub_scores: Mapping[str, Any] = field(default_factory=dict)
    errors: Sequence[str | None] | None = None
    marks: Sequence[Sequence[tuple[int, int, str]]] | None = None


@dataclass(frozen=True)
class Parameters:
    """What a reward's signature accepts, apart from `images`."""

    takes_prompts: bool
    columns: tuple[str, ...]
    required: tuple[str, ...]
    takes_all: bool
    options: tuple[str, ...]

    @property
    def unit(self) -> Literal["image", "answer"]:
        """What is scored: a reward that asks for `responses` scores answers."""
        return "answer" if "responses" in self.columns else "image"


def parameters(reward: Any, name: str) -> Parameters:
    """Read from the signature's parameters (never from local variables, which `co_varnames` holds as well)."""
    if not callable(reward):
        raise RewardError(
            f"reward {name!r} is a {type(reward).__name__} that cannot be called; expected a function "
            "(images, prompts, **columns) or a class with such a __call__"
        )
    function = reward.forward if is_module(reward) else reward
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
        raise RewardError(f"reward {name!r} is asynchronous; expected a plain function (images, prompts, **columns)")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise RewardError(f"reward {name!r} hides its parameters; wrap it: def {name}(images, prompts): ...") from None
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in by_name]
    if "images" not in names or any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        shown = ", ".join(str(p).split(":")[0] for p in parameters)
        raise RewardError(
            f"reward {name!r} has the parameters ({shown}); expected (images, prompts, **columns), by these names"
        )
    is_function = inspect.isroutine(reward)
    options = [p for p in by_name if is_function and p.kind is p.KEYWORD_ONLY and p.name not in ("images", "prompts")]
    columns = [p for p in by_name if p.name not in ("images", "prompts") and p not in options]
    return Parameters(
        takes_prompts="prompts" in names,
        columns=tuple(p.name for p in columns),
        required=tuple(p.name for p in columns if p.default is p.empty),
        takes_all=any(p.kind is p.VAR_KEYWORD for p in parameters),
        options=tuple(p.name for p in options),
    )


def checked_range(name: str, declared: Any) -> tuple[float, float] | None:
    if declared is None:
        return None
    try:
        low, high = (float(value) for value in declared)
    except (TypeError, ValueError):
        raise RewardError(f"reward {name!r}: range is {declared!r}, expected two numbers (low, high)") from None
    if not low < high:
        raise RewardError(f"reward {name!r}: range is {declared!r}, expected low < high")
    return low, high


def check_inputs(
    name: str, images: Sequence[Any], prompts: Sequence[Any], columns: Sequence[Any] | None, unit: str = "image"
) -> None:
    if len(prompts) != len(images):
        raise ValueError(f"reward {name!r}: {len(images)} images but {len(prompts)} prompts; give one per {unit}")
    if columns is not None and len(columns) != len(images):
        raise ValueError(
            f"reward {name!r}: {len(images)} images but {len(columns)} rows of columns; give one per {unit}"
        )
    for n, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        shown = image if unit == "answer" and isinstance(image, (list, tuple)) else [image]
        for part in shown:
            _check_image(name, n, part)
        if not isinstance(prompt, str):
            raise ValueError(f"reward {name!r}: prompt {n} is {type(prompt).__name__}, expected str")


def _check_image(name: str, index: int, image: Any) -> None:
    from PIL import Image

    if not isinstance(image, Image.Image) or image.mode != "RGB":
        found = f"a PIL image of mode {image.mode}" if isinstance(image, Image.Image) else type(image).__name__
        raise ValueError(
            f"reward {name!r}: image {index} is {found}, expected an RGB PIL image (mmalign.types.ImageRef.open)"
        )


def numbers(value: Any, what: str, num: int, unit: str = "image") -> list[float]:
    """`value` as N floats rounded to fp32, None as NaN. `what` opens the error message."""
    import numpy as np

    expected = f"expected {num} real numbers, one per {unit}, as a list, array or tensor [{num}]"
    if isinstance(value, Mapping):
        raise RewardError(
            f"{what} a dict; {expected}. Named parts go into mmalign.reward.RewardOutput(scores, sub_scores)", "dtype"
        )
    if isinstance(value, (list, tuple)):
        items = [_number(item, n, what, expected) for n, item in enumerate(value)]
        array = np.array(items, dtype=np.float64)
    elif not isinstance(value, (str, bytes)) and (_is_tensor(value) or hasattr(value, "__array__")):
        array = _array(value)
        if array.dtype.kind == "O" and array.ndim == 1:
            return numbers(array.tolist(), what, num, unit)
        if array.dtype.kind not in "biuf":
            raise RewardError(f"{what} an array of {array.dtype}; {expected}", "dtype")
    else:
        raise RewardError(f"{what} {_type_name(value)}; {expected}", "shape" if isinstance(value, Real) else "dtype")
    if array.ndim != 1:
        fix = ". Drop the last dimension: scores[:, 0]" if array.ndim == 2 and array.shape[1] == 1 else ""
        raise RewardError(f"{what} an array of shape {list(array.shape)}; {expected}{fix}", "shape")
    if len(array) != num:
        raise RewardError(f"{what} {len(array)} scores for {num} {unit}s; {expected}", "shape")
    with np.errstate(over="ignore"):
        return [float(number) for number in array.astype(np.float32)]


def _number(item: Any, index: int, what: str, expected: str) -> float:
    if item is None:
        return math.nan
    if not isinstance(item, Number) and (_is_tensor(item) or hasattr(item, "__array__")):
        array = _array(item)
        if array.ndim:
            raise RewardError(f"{what} a list whose item {index} has shape {list(array.shape)}; {expected}", "shape")
        item = array.item()
    if isinstance(item, Real):
        try:
            return float(item)
        except OverflowError:
            return math.inf
    nested = isinstance(item, (list, tuple))
    shown = f"a {type(item).__name__} of {len(item)}" if nested else f"{_type_name(item)} {str(item)[:40]!r}"
    raise RewardError(f"{what} a list whose item {index} is {shown}; {expected}", "shape" if nested else "dtype")


def _array(value: Any) -> np.ndarray:
    import numpy as np

    if _is_tensor(value):
        value = value.detach().cpu()
        # numpy has no bfloat16
        value = value.double() if value.is_floating_point() else value
    return np.asarray(value)


def reasons(errors: Any, name: str, num: int, unit: str = "image") -> list[str | None]:
    if errors is None:
        return [None] * num
    if not isinstance(errors, (list, tuple)) or any(not isinstance(e, (str, type(None))) for e in errors):
        raise RewardError(f"reward {name!r}: errors is {errors!r:.80}, expected a list of str or None", "dtype")
    if len(errors) != num:
        raise RewardError(
            f"reward {name!r} returned {len(errors)} errors for {num} {unit}s, expected one each", "shape"
        )
    return [error or None for error in errors]


def checked_marks(
    marks: Any, name: str, responses: Sequence[Any] | None, num: int
) -> list[list[tuple[int, int, str]]] | None:
    """Each answer's marks in their order, or None if the reward gave none at all."""
    if marks is None:
        return None
    if responses is None:
        raise RewardError(f"reward {name!r} returned marks, which are for answers, but takes no `responses`", "shape")
    if not isinstance(marks, (list, tuple)) or len(marks) != num:
        found = f"{len(marks)} lists" if isinstance(marks, (list, tuple)) else _type_name(marks)
        raise RewardError(
            f"reward {name!r} returned marks as {found} for {num} answers, expected one list each", "shape"
        )
    checked = []
    for n, (spans, response) in enumerate(zip(marks, responses, strict=True)):
        length = len(response) if isinstance(response, str) else 0
        for mark in spans:
            start, end, kind = mark if isinstance(mark, (list, tuple)) and len(mark) == 3 else (None, None, None)
            if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= length):
                raise RewardError(
                    f"reward {name!r}: mark {mark!r} of answer {n} is no (start, end, kind) with "
                    f"0 <= start < end <= {length}, the length of the answer",
                    "shape",
                )
            if kind not in MARK_KINDS:
                raise RewardError(
                    f"reward {name!r}: mark {mark!r} of answer {n}: allowed kinds are {', '.join(MARK_KINDS)}", "dtype"
                )
        checked.append(sorted((int(start), int(end), str(kind)) for start, end, kind in spans))
    return checked


def _type_name(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def is_module(reward: Any) -> bool:
    import torch

    return isinstance(reward, torch.nn.Module)
