"""Rows that are answered in text: messages become turns, images become `<image>` marks, and the checks all readers share.

    {"images": ["cat.png"], "prompt": "What is this?", "chosen": "A cat.", "rejected": "A dog."}
    {"images": […], "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "…"}]}],
     "chosen": [{"role": "assistant", "content": "…"}], "rejected": […]}

`messages` may stand for `prompt`; where neither is given, the turns that `chosen` and `rejected` share are the prompt.
A plain prompt without any mark shows its images first, in the first user turn (as in TRL).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from mmalign.data.fields import (
    NUMBERS,
    BadRow,
    BadValueError,
    Columns,
    RowBuilder,
    check_encodable,
    digest_of,
    missing,
    numbers_of,
)
from mmalign.registry import nearest
from mmalign.types import IMAGE_MARK, ImageRef, Role, Row, Turn

ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class TextColumns:
    """Where the values of a text row are. Of `images` the first column that holds any is taken."""

    prompt: str = "prompt"
    messages: str = "messages"
    chosen: str = "chosen"
    rejected: str | None = "rejected"
    images: tuple[str, ...] = ("images", "image")
    rejected_images: tuple[str, ...] = ("rejected_images",)
    id: str = "id"
    keep: tuple[str, ...] | None = None

    def roles(self) -> list[str]:
        """Columns with a meaning of their own."""
        names = [self.id, self.prompt, self.messages, self.chosen, *NUMBERS, *self.images, *self.rejected_images]
        return names if self.rejected is None else [*names, self.rejected]

    def extra(self, available: Iterable[str]) -> list[str]:
        """Columns that become `Row.columns`: those asked for, or all without a role."""
        return list(self.keep) if self.keep is not None else [name for name in available if name not in self.roles()]


def text_columns_of(
    prompt: str, chosen: str, rejected: str | None, id: str, images: str | None, keep: tuple[str, ...] | None
) -> TextColumns:
    """`TextColumns` from a reader's options; `images` None: the usual names."""
    shown = TextColumns.images if images is None else (images,)
    shown = tuple(name for name in shown if name not in (chosen, rejected))
    return TextColumns(prompt, chosen=chosen, rejected=rejected, images=shown, id=id, keep=keep)


@dataclass
class TextBuilder:
    """Checks raw values and makes rows; keeps count of derived ids, so use one per read.

    Args:
        columns: where values are.
        with_responses: False for questions: responses are neither needed nor kept.
        allow_empty_prompt: accept a prompt that is empty or only white space.
    """

    columns: TextColumns
    with_responses: bool = True
    allow_empty_prompt: bool = False
    _ids: RowBuilder = field(init=False)

    def __post_init__(self) -> None:
        self._ids = RowBuilder(Columns(id=self.columns.id))

    def build(
        self,
        values: Mapping[str, Any],
        *,
        source: str,
        images: Sequence[tuple[ImageRef, str]] = (),
        rejected_images: Sequence[tuple[ImageRef, str]] = (),
    ) -> Row | BadRow:
        """One row from raw values.

        Args:
            images, rejected_images: each with its name, which enters the id where the row brings none.
        """
        try:
            turns, structured, chosen, rejected = self._dialogue(values)
            if images and not structured and not any(IMAGE_MARK in turn.text for turn in turns):
                turns = _images_first(turns, len(images))
            for text in (*(turn.text for turn in turns), chosen, rejected):
                check_encodable(text, "the text")
            *history, last = turns
            if last.role != "user":
                raise BadValueError(f"the prompt ends with a turn of the {last.role}; it must end with one of the user")
            if not last.text.strip() and not self.allow_empty_prompt:
                raise BadValueError(
                    "the prompt is empty; write a question, or allow it with data.options.allow_empty_prompt: true"
                )
            numbers = numbers_of(values)
            names = [name for _, name in (*images, *rejected_images)]
            identity = digest_of([[turn.role, turn.text] for turn in turns], chosen, rejected, names)
            row_id = self._ids.row_id(values, identity)
        except BadValueError as error:
            return BadRow(source, str(error))
        row = Row(
            id=row_id,
            prompt=last.text,
            chosen=chosen,
            rejected=rejected,
            preference=numbers.preference,
            margin=numbers.margin,
            score_chosen=numbers.score_chosen,
            score_rejected=numbers.score_rejected,
            source=source,
            columns={name: values[name] for name in self.columns.extra(values) if name in values},
            images=tuple(ref for ref, _ in images),
            rejected_images=tuple(ref for ref, _ in rejected_images),
            history=tuple(history),
        )
        problem = response_problem(row)
        return row if problem is None else BadRow(source, problem)

    def _dialogue(self, values: Mapping[str, Any]) -> tuple[list[Turn], bool, str | None, str | None]:
        """Turns of the prompt, whether they came as parts, and the two responses."""
        names = self.columns
        chosen, rejected = values.get(names.chosen), values.get(names.rejected) if names.rejected is not None else None
        raw = values.get(names.prompt)
        raw_name = names.prompt
        if raw is None and values.get(names.messages) is not None:
            raw, raw_name = values[names.messages], names.messages
        if not self.with_responses:
            if raw is None:
                raise BadValueError(missing(names.prompt, values))
            turns, structured = parse_prompt(raw, raw_name)
            return turns, structured, None, None
        if chosen is None:
            raise BadValueError(missing(names.chosen, values) if names.chosen not in values else _null(names.chosen))
        if names.rejected is not None and rejected is None:
            absent = names.rejected not in values
            raise BadValueError(missing(names.rejected, values) if absent else _null(names.rejected))
        if raw is None:
            return _implicit(chosen, rejected, names, values)
        turns, structured = parse_prompt(raw, raw_name)
        chosen_text = _response(chosen, names.chosen, turns)
        rejected_text = None if names.rejected is None else _response(rejected, names.rejected, turns)
        return turns, structured, chosen_text, rejected_text


def parse_prompt(value: Any, name: str) -> tuple[list[Turn], bool]:
    """Turns of a prompt given as text or messages, and whether any content came as a list of parts."""
    if isinstance(value, str):
        return [Turn("user", value)], False
    return parse_messages(value, name), any(isinstance(_get(message, "content"), list) for message in _listed(value))


def parse_messages(value: Any, name: str) -> list[Turn]:
    """Turns of a list of {"role", "content"} messages. Raises `BadValueError` naming the message."""
    messages = _listed(value)
    if not messages:
        raise BadValueError(f"{name!r} is {value!r}; it must be text or a list of {{role, content}} messages")
    turns = []
    for index, message in enumerate(messages):
        where = f"{name}[{index}]"
        if not isinstance(message, Mapping) or "role" not in message:
            raise BadValueError(f"{where} is {str(message)[:80]}; a message needs the keys role and content")
        role = message["role"]
        if role not in ROLES:
            raise BadValueError(
                f"{where} has the unknown role {role!r}{nearest(role, ROLES)}; roles: {', '.join(ROLES)}"
            )
        turns.append(Turn(role, content_text(message.get("content"), where)))
    return turns


def content_text(content: Any, where: str) -> str:
    """Text of a message's content, an `<image>` mark for each image part."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadValueError(f"{where}: content is {content!r}; it must be text or a list of text and image parts")
    text = ""
    after_image = False
    for number, part in enumerate(content):
        kind = _get(part, "type")
        if kind == "image":
            if any(_get(part, key) is not None for key in ("image", "url", "path", "base64")):
                raise BadValueError(f"{where}: part {number} holds the image itself; put it into the images column")
            text += IMAGE_MARK
        elif kind == "text" and isinstance(_get(part, "text"), str):
            # One line break between an image and its text, as LLaVA was trained; templates write the same.
            text += "\n" + part["text"].removeprefix("\n") if after_image else part["text"]
        else:
            raise BadValueError(
                f"{where}: part {number} is {str(part)[:80]}; parts are {{type: text, text: …}} and {{type: image}}"
            )
        after_image = kind == "image"
    return text


def response_problem(row: Row) -> str | None:
    """Why a row cannot be answered in text, seen from the row alone."""
    marks = sum(text.count(IMAGE_MARK) for text in (*(turn.text for turn in row.history), row.prompt))
    if marks != len(row.images):
        return (
            f"the prompt has {marks} {IMAGE_MARK} mark(s) for {len(row.images)} image(s); it needs one mark where each "
            f"image is shown"
        )
    if row.rejected_images and len(row.rejected_images) != len(row.images):
        return f"{len(row.rejected_images)} rejected_images for {len(row.images)} images; give one for each, or none"
    for side, response in (("chosen", row.chosen), ("rejected", row.rejected)):
        if response is None:
            continue
        if not isinstance(response, str):
            return f"{side} is an image, but the model answers in text; give text, or a model that draws images"
        if not response.strip():
            return f"{side} is empty ({response!r}); write a response or remove the row"
        if IMAGE_MARK in response:
            return f"{side} holds {IMAGE_MARK}; only prompts show images"
    if row.rejected is not None and row.chosen == row.rejected:
        return "chosen and rejected are the same text: nothing to prefer; remove the row"
    return None


def _implicit(
    chosen: Any, rejected: Any, names: TextColumns, values: Mapping[str, Any]
) -> tuple[list[Turn], bool, str, str]:
    """The prompt is what both conversations share (TRL's implicit prompt)."""
    if names.rejected is None or isinstance(chosen, str) or isinstance(rejected, str):
        raise BadValueError(
            f"{missing(names.prompt, values)}. A prompt inside chosen and rejected is found only in messages"
        )
    sides = [parse_messages(chosen, names.chosen), parse_messages(rejected, names.rejected)]
    shared = 0
    while shared < min(map(len, sides)) - 1 and sides[0][shared] == sides[1][shared]:
        shared += 1
    if not shared:
        raise BadValueError(f"{names.chosen!r} and {names.rejected!r} share no turn that could be the prompt")
    structured = any(isinstance(_get(message, "content"), list) for message in _listed(chosen)[:shared])
    texts = [
        _only_answer(turns[shared:], name) for turns, name in zip(sides, (names.chosen, names.rejected), strict=True)
    ]
    return sides[0][:shared], structured, texts[0], texts[1]


def _response(value: Any, name: str, prompt: list[Turn]) -> str:
    """The response as text; messages may repeat the prompt (UltraFeedback does)."""
    if isinstance(value, str):
        return value
    turns = parse_messages(value, name)
    return _only_answer(turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns, name)


def _only_answer(turns: Sequence[Turn], name: str) -> str:
    roles = [turn.role for turn in turns]
    if roles != ["assistant"]:
        raise BadValueError(
            f"{name!r} must be one answer of the assistant after the prompt, found {', '.join(roles) or 'nothing'}"
        )
    return turns[0].text


def _images_first(turns: Sequence[Turn], number: int) -> list[Turn]:
    marked = list(turns)
    for index, turn in enumerate(marked):
        if turn.role == "user":
            marked[index] = replace(turn, text=f"{IMAGE_MARK}\n" * number + turn.text)
            break
    return marked


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, Mapping) else value if isinstance(value, list) else []


def _get(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else None


def _null(name: str) -> str:
    return f"{name!r} is null; write a response or remove the row"
