"""Published formats of answers to prefer: TRL's preference datasets, RLHF-V and RLAIF-V, mDPO.

Each reads local JSONL, JSON, Parquet and Arrow files, folders of them, and hub ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mmalign.data.fields import BadRow, BadValueError, required
from mmalign.data.records import open_records, text_rows
from mmalign.data.texts import TextColumns
from mmalign.types import Row

RLHF_V_IMAGES = ("image", "image_path")
RLHF_V_FIELDS = ("question", "chosen", "rejected")
MDPO_TURN = re.compile(r"(?:^|(?<=\s)|</s>|<\|endoftext\|>)(USER|ASSISTANT):")


def read_trl(
    path: str,
    *,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    media: str | None = None,
    columns: list[str] | None = None,
) -> Iterator[Row | BadRow]:
    """TRL's preference datasets: `prompt`, `chosen`, `rejected` as text or messages, `images` or `image` for vision.

    Without `prompt` the turns that `chosen` and `rejected` share are the prompt. Text prompts become a user turn.

    Args:
        split: e.g. `train`; default: `train`, for Parquet files the only split there is.
        name: configuration (subset) of a dataset.
        revision: branch, tag or commit on the hub.
        media: folder that relative image paths start at. Default: that of the file.
        columns: further columns to keep for rewards. Default: all that hold no binary data.
    """
    names = TextColumns(keep=None if columns is None else tuple(columns))
    needed = [names.chosen, "rejected"]
    records = open_records(path, names, needed=needed, split=split, name=name, revision=revision, media=media)
    return text_rows(records, names)


def read_rlhf_v(
    path: str,
    *,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    media: str | None = None,
    columns: list[str] | None = None,
) -> Iterator[Row | BadRow]:
    """RLHF-V and RLAIF-V as published: `image` (or `image_path`), `question`, `chosen`, `rejected`; RLHF-V keeps the
    last three as JSON in the column `text`.

    Args:
        split: e.g. `train`; default: `train`, for Parquet files the only split there is.
        name: configuration (subset) of a dataset.
        revision: branch, tag or commit on the hub.
        media: folder that `image_path` starts at where `image` is absent. Default: that of the file.
        columns: further columns to keep for rewards. Default: all that hold no binary data.
    """
    # `idx` counts within the original data sets and repeats, so that it is no id.
    keep = None if columns is None else tuple(columns)
    names = TextColumns(prompt="question", images=RLHF_V_IMAGES, rejected_images=(), id="\0 no id column", keep=keep)
    records = open_records(path, _with_text(names), split=split, name=name, revision=revision, media=media)
    return text_rows(records, names, convert=_unpacked)


def read_mdpo(
    path: str,
    *,
    split: str | None = None,
    revision: str | None = None,
    media: str | None = None,
    keep_system: bool = False,
    columns: list[str] | None = None,
) -> Iterator[Row | BadRow]:
    """mDPO's preference data: `img_path`, `prompt`, `chosen`, `rejected`.

    Its prompts come in Bunny's template ("A chat between … USER: <image>\\nquestion ASSISTANT:"); they are taken apart,
    as every model has a template of its own. Prompts without a template are taken as they are.

    Args:
        split: e.g. `train`; for datasets.
        revision: branch, tag or commit on the hub.
        media: folder that `img_path` starts at. Default: that of the file.
        keep_system: keep the template's first sentences as a system turn.
        columns: further columns to keep for rewards. Default: all that hold no binary data.
    """
    keep = None if columns is None else tuple(columns)
    names = TextColumns(images=("img_path",), rejected_images=(), keep=keep)
    records = open_records(path, names, needed=["prompt"], split=split, revision=revision, media=media)

    def without_template(values: Mapping[str, Any]) -> Mapping[str, Any]:
        required(values, "img_path")
        return {**values, "prompt": _without_template(required(values, "prompt"), keep_system)}

    return text_rows(records, names, convert=without_template)


def _with_text(names: TextColumns) -> TextColumns:
    """The same columns and `text`, so that a table reads it."""
    return names if names.keep is None else replace(names, keep=(*names.keep, "text"))


def _unpacked(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """RLHF-V's column `text` taken apart; RLAIF-V rows as they are."""
    if "question" in values or "text" not in values:
        return values
    text = values["text"]
    if isinstance(text, str):
        try:
            text = json.loads(text)
        except ValueError as error:
            raise BadValueError(f"'text' is not JSON: {error}") from None
    if not isinstance(text, Mapping):
        raise BadValueError(f"'text' holds {type(text).__name__}, expected an object with {', '.join(RLHF_V_FIELDS)}")
    light = {key: value for key, value in values.items() if key != "text"}
    return {**light, **{key: required(text, key) for key in RLHF_V_FIELDS}}


def _without_template(prompt: Any, keep_system: bool) -> Any:
    """Messages of a prompt in the Vicuna-like template of Bunny and LLaVA; other prompts unchanged."""
    if not isinstance(prompt, str):
        return prompt
    parts = MDPO_TURN.split(prompt)
    if len(parts) == 1:
        return prompt
    system, roles, texts = parts[0].strip(), parts[1::2], [text.strip() for text in parts[2::2]]
    expected = ["USER", "ASSISTANT"] * (len(roles) // 2)
    if roles != expected or texts[-1]:
        raise BadValueError(
            f"'prompt' is in a template of USER: and ASSISTANT: that does not alternate up to an empty ASSISTANT: "
            f"{prompt[-80:]!r}"
        )
    turns = [{"role": role.lower(), "content": text} for role, text in zip(roles[:-1], texts[:-1], strict=True)]
    return [{"role": "system", "content": system}, *turns] if keep_system and system else turns
