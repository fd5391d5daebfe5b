"""From rows to token ids: chat template, image placeholders, response span, length limit.

The conversation is rendered once, response included, and the prompt part must be a token prefix of it. Tokenizing prompt
and response apart would place other token boundaries than the model sees when it answers.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mmalign.policies.weights import tokenizer_settings
from mmalign.types import IMAGE_MARK, DataError, ImageRef, Row, Side, Turn

logger = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant")
Dialogue = tuple[Turn, ...]
PROBE = "(an answer)"


class ChatText:
    """Tokenizes rows with a processor's chat template.

    Args:
        processor: of the model; its chat template and tokenizer are used.
        image_token_id: the placeholder the model replaces by image features.
        num_image_tokens: (height, width) of an image to its number of placeholders, or the number where it is the same for
            all sizes, so that image files need not be opened.
        max_length: longest row in tokens, image tokens included.
        truncate: cut over-long rows; False makes them errors.

    `truncated` holds the ids of rows that were cut.
    """

    def __init__(
        self,
        processor: Any,
        *,
        image_token_id: int,
        num_image_tokens: Callable[[tuple[int, int]], int] | int,
        max_length: int,
        truncate: bool,
    ) -> None:
        if not getattr(processor, "chat_template", None):
            raise ValueError(
                "the model's processor has no chat template, so how a dialogue is written is unknown: put a "
                "chat_template.jinja beside its processor_config.json"
            )
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.image_token_id = image_token_id
        self.num_image_tokens = num_image_tokens
        self.max_length, self.truncate = max_length, truncate
        self.truncated: set[str] = set()
        self._warned: set[str] = set()
        # Prompt and responses of a row are asked for apart, and again in every epoch.
        self._tokenize = lru_cache(maxsize=8192)(self._tokenize_uncached)

    def fingerprint(self) -> str:
        """Identity of tokenizer, template and length limit."""
        text = json.dumps(tokenizer_settings(self.tokenizer), sort_keys=True)
        text += f"{self.processor.chat_template}{self.max_length}{self.truncate}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def tokenize(self, row: Row, side: Side) -> tuple[Tensor, Tensor]:
        """Prompt ids `[P]` and response ids `[T]` of a row.

        The prompt is the same for both sides, image placeholders repeated; the response ends with the template's
        end-of-turn token. A row with a prompt alone has a response of no tokens.

        Raises `DataError` naming the row when images and marks differ in number, a role is unknown, the response is empty
        or not text, or the row is too long.
        """
        response = getattr(row, side)
        ids_P, ids_T, cut = self._named(row, response, side)
        if cut:
            self._count(row)
        return ids_P, ids_T

    def prompt(self, row: Row) -> Tensor:
        """Prompt ids `[P]` alone, whatever the row's responses. Raises as `tokenize`."""
        return self._named(row, None, "")[0]

    def _named(self, row: Row, response: Any, side: str) -> tuple[Tensor, Tensor, bool]:
        try:
            dialogue = self._dialogue(row)
            if response is not None:
                _check_response(response, side)
            return self._tokenize(dialogue, response, tuple(self._num_tokens_of(ref) for ref in row.images))
        except _UnusableError as error:
            raise DataError(f"{row.source or row.id}: {error}") from error

    def _dialogue(self, row: Row) -> Dialogue:
        """All turns up to the question, marks and images matched. Raises `_UnusableError`."""
        turns = (*row.history, Turn("user", row.prompt))
        unknown = next((turn.role for turn in turns if turn.role not in ROLES), None)
        if unknown is not None:
            raise _UnusableError(f"role {unknown!r} is unknown; use {', '.join(ROLES)}")
        num_marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
        if num_marks == 0 and row.images:
            first = next(index for index, turn in enumerate(turns) if turn.role == "user")
            marked = Turn("user", f"{IMAGE_MARK}\n" * len(row.images) + turns[first].text)
            return (*turns[:first], marked, *turns[first + 1 :])
        if num_marks != len(row.images):
            raise _UnusableError(
                f"{num_marks} {IMAGE_MARK} mark(s) but {len(row.images)} image(s); write one mark where each is shown"
            )
        return turns

    def _num_tokens_of(self, ref: ImageRef) -> int:
        if isinstance(self.num_image_tokens, int):
            return self.num_image_tokens
        from PIL import ExifTags, Image

        # The header alone: pixels are decoded when they are encoded.
        try:
            with Image.open(io.BytesIO(ref.read_bytes())) as image:
                width, height = image.size
                if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:  # shown rotated by a quarter turn
                    width, height = height, width
        except (OSError, ValueError) as error:
            raise DataError(f"{ref.source}: cannot read the size of the image: {error}") from error
        return self.num_image_tokens((height, width))

    def _tokenize_uncached(
        self, dialogue: Dialogue, response: str | None, counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, bool]:
        turns, ids_P = self._fit_prompt(dialogue, counts)
        cut = len(turns) != len(dialogue)
        if response is None:
            return torch.tensor(ids_P), torch.zeros(0, dtype=torch.long), cut
        ids_T = self._response_ids(turns, response)
        room = self.max_length - len(ids_P)
        if len(ids_T) > room:
            if not self.truncate:
                raise _UnusableError(
                    f"{len(ids_P)} prompt and {len(ids_T)} response tokens exceed the limit of {self.max_length} (image "
                    f"tokens count); raise data.max_length, or set data.truncation=response"
                )
            ids_T, cut = ids_T[:room], True
        if not self.tokenizer.decode(ids_T, skip_special_tokens=True).strip():
            raise _UnusableError(
                f"nothing of the response {response[:40]!r} is left in its {len(ids_T)} token(s): "
                + ("raise data.max_length" if cut else "the tokenizer does not know its characters")
            )
        return torch.tensor(ids_P), torch.tensor(ids_T), cut

    def _fit_prompt(self, dialogue: Dialogue, counts: tuple[int, ...]) -> tuple[Dialogue, list[int]]:
        """The prompt, its oldest exchanges without images dropped until one response token has room.

        Whatever the response: chosen and rejected must be answers to the same prompt.
        """
        while True:
            ids_P = self._expand(self._ids(self._render(dialogue)), counts)
            if len(ids_P) < self.max_length:
                return dialogue, ids_P
            shorter = _drop_oldest(dialogue) if self.truncate else None
            if shorter is None:
                advice = "no turn without an image is left to drop" if self.truncate else "raise data.max_length"
                raise _UnusableError(
                    f"the prompt has {len(ids_P)} tokens, {sum(counts)} of them of images; the limit is "
                    f"{self.max_length} and leaves no room for a response: {advice}"
                )
            dialogue = shorter

    def _response_ids(self, turns: Dialogue, response: str) -> list[int]:
        prompt_text, text = self._render(turns), self._render(turns, response)
        if not text.startswith(prompt_text):
            raise _UnusableError(
                "the chat template renders the prompt otherwise once it is answered, so the response has no exact span: "
                f"{prompt_text[-60:]!r} is not where {text[-120:]!r} begins"
            )
        text = self._end_turn(turns, text)
        prompt, full = self._ids(prompt_text), self._ids(text)
        if full[: len(prompt)] != prompt:
            raise _UnusableError(
                f"the prompt {prompt_text[-60:]!r} is not a token prefix of the answered prompt: the tokenizer joins "
                f"prompt and response. A template that ends the prompt with a special token avoids it"
            )
        ids_T = full[len(prompt) :]
        if self.image_token_id in ids_T:
            raise _UnusableError(f"the response holds the model's image token {self.processor.image_token!r}")
        return ids_T

    def _end_turn(self, turns: Dialogue, text: str) -> str:
        """`text` up to the first special token that the template writes after an answer: there a model stops.

        ChatML writes a line break behind it, which no model is asked for. A template that writes no special token gets
        the end-of-text token: LLaVA-1.5's ends with a space, and trained on it a model would forget where to stop.
        """
        closing = self._render(turns, PROBE).rpartition(PROBE)[2]
        if not text.endswith(closing):
            raise _UnusableError(
                f"the chat template ends this answer otherwise than another, so its end is unknown: {text[-60:]!r} does "
                f"not end with {closing!r}"
            )
        places = [(closing.index(token), token) for token in self._special_tokens() if token in closing]
        if places:
            start, end = min(places)
            answer, before = text[: len(text) - len(closing)], closing[:start]
        else:
            answer, before, end = text.rstrip(), "", self.tokenizer.eos_token
            if end is None:
                return answer
        if answer.rstrip().endswith(end):  # some data sets write it into their answers
            return answer.rstrip()
        if not places:
            self._say_once(f"the chat template ends an answer with no special token; {end!r} is added as end of turn")
        return answer + before + end

    def _special_tokens(self) -> list[str]:
        """Those of the vocabulary; `all_special_tokens` alone leaves out an added end of turn that is not the end of text."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        return [*self.tokenizer.all_special_tokens, *(str(token) for token in added if token.special)]

    def _render(self, turns: Dialogue, response: str | None = None) -> str:
        import jinja2

        messages: list[dict[str, Any]] = [{"role": turn.role, "content": _parts(turn.text)} for turn in turns]
        if any(_images_follow_text(message["content"]) for message in messages) and not self._keeps_order():
            self._say_once(
                "the chat template shows all images of a turn before its text, whatever the place of its marks"
            )
        if response is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": response}]})
        try:
            return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=response is None)
        except jinja2.TemplateError as error:
            raise _UnusableError(f"the chat template refuses the dialogue: {error}") from error

    def _keeps_order(self) -> bool:
        parts = [{"type": "text", "text": "before"}, {"type": "image"}]
        text = self.processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
        return text.find("before") < text.find(self.processor.image_token)

    def _ids(self, text: str) -> list[int]:
        # What the stock processors do: a template that writes the first special token itself gets no second one.
        bos = self.tokenizer.bos_token
        return self.tokenizer(text, add_special_tokens=bos is None or not text.startswith(bos))["input_ids"]

    def _expand(self, ids: list[int], counts: Sequence[int]) -> list[int]:
        """Repeat each image placeholder to its image's number of tokens."""
        num_found = ids.count(self.image_token_id)
        if num_found != len(counts):
            raise _UnusableError(
                f"the rendered prompt has {num_found} image tokens for {len(counts)} image(s): the text holds the model's "
                f"image token {self.processor.image_token!r}, or the chat template drops images"
            )
        remaining = iter(counts)
        expanded: list[int] = []
        for token in ids:
            expanded += [token] * next(remaining) if token == self.image_token_id else [token]
        return expanded

    def _count(self, row: Row) -> None:
        if not self.truncated:
            self._say_once(
                f"{row.source or row.id}: longer than {self.max_length} tokens, cut (data.truncation: response)"
            )
        self.truncated.add(row.id)

    def _say_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


class _UnusableError(ValueError):
    """Why a row cannot be tokenized; `tokenize` puts the row's name in front."""


def _check_response(response: Any, side: str) -> None:
    if not isinstance(response, str):
        raise _UnusableError(f"{side} is a {type(response).__name__}, but a language model answers in text")
    if not response.strip():
        raise _UnusableError(f"{side} is empty ({response!r})")
    if IMAGE_MARK in response:
        raise _UnusableError(f"{side} holds {IMAGE_MARK}; only prompts show images")


def _parts(text: str) -> list[dict[str, str]]:
    """Text and image parts, in order. Line breaks beside a mark separate it from the text and go with it."""
    parts: list[dict[str, str]] = []
    pieces = text.split(IMAGE_MARK)
    for index, piece in enumerate(pieces):
        if index > 0:
            parts.append({"type": "image"})
            piece = piece.lstrip("\n")
        if index < len(pieces) - 1:
            piece = piece.rstrip("\n")
        if piece.strip():
            parts.append({"type": "text", "text": piece})
    return parts


def _images_follow_text(parts: Sequence[dict[str, str]]) -> bool:
    kinds = [part["type"] for part in parts]
    return "text" in kinds and "image" in kinds[kinds.index("text") :]


def _drop_oldest(dialogue: Dialogue) -> Dialogue | None:
    """Without its oldest exchange (a user turn and the answers to it) that shows no image; None if there is none left."""
    starts = [index for index, turn in enumerate(dialogue) if turn.role == "user"]
    for start, end in itertools.pairwise(starts):
        if not any(IMAGE_MARK in turn.text for turn in dialogue[start:end]):
            return dialogue[:start] + dialogue[end:]
    return None
