"""`mmalign rewards list` and `mmalign rewards new NAME`: what is there, and a start for your own."""

from __future__ import annotations

import inspect
import keyword
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign import registry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class RewardCard:
    """What is known of a registered reward without loading its model. `needs_prompt` None: not declared."""

    name: str
    summary: str
    options: dict[str, Any]
    needs_prompt: bool | None
    target: str


def list_rewards(console: Console | None = None) -> None:
    """Print the registered rewards with what they need and their options."""
    from rich.console import Console

    (console or Console()).print(rewards_table(reward_cards()))


def reward_cards() -> list[RewardCard]:
    """The registered rewards by name."""
    cards = []
    for name in registry.names("reward"):
        target = registry.resolve("reward", name)
        fields = registry.options_model(target).model_fields
        options = {key: field.get_default() for key, field in fields.items() if key != "device"}
        summary = " ".join((inspect.getdoc(target) or "").split("\n\n")[0].split())
        needs_prompt = getattr(target, "needs_prompt", None)
        cards.append(RewardCard(name, summary, options, needs_prompt, registry.TABLES["reward"][name]))
    return cards


def rewards_table(cards: Sequence[RewardCard]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in ("reward", "what it says", "prompt", "options and defaults"):
        table.add_column(column, overflow="fold")
    shown = {True: "needed", False: "ignored", None: "not declared"}
    for card in cards:
        options = "\n".join(f"{key}: {value}" for key, value in card.options.items())
        table.add_row(Text(card.name, style="bold"), Text(card.summary), Text(shown[card.needs_prompt]), Text(options))
    return table


def new_reward(name: str, folder: str | Path = ".") -> Path:
    """Write `NAME.py` with a working reward class, say what to do next, and return the path.

    The class is called `NAME` in CamelCase.

    Raises `ValueError` for a name that is no Python module name, or a file that exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ValueError(
            f"reward name {name!r}: expected small letters, digits and _, starting with a letter: my_reward"
        )
    path = Path(folder).expanduser() / f"{name}.py"
    text = TEMPLATE.replace("CLASS", class_name(name)).replace("FILE", path.name)
    if path.exists():
        raise ValueError(f"{str(path)!r} exists already; choose another name or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ValueError(f"cannot write {str(path)!r}: {error.strerror}") from None
    print(f"wrote {path}; next: mmalign rewards check {path}:{class_name(name)}")
    return path


def class_name(name: str) -> str:
    """`my_reward` -> `MyReward`."""
    return "".join(part.capitalize() for part in name.split("_"))


TEMPLATE = '''"""A reward for mmalign.

    mmalign rewards check FILE:CLASS                keeps the contract?
    mmalign score --reward FILE:CLASS images/       scores a folder

In a config:  rewards: [{name: FILE:CLASS, weight: 1.0, target: 0.6}]
"""

import numpy as np


class CLASS:
    """How close an image's mean brightness is to a target. Replace this with your own."""

    needs_prompt = False  # True: images without a prompt get no score
    range = (0.0, 1.0)  # of the scores you return; scores stay raw, nothing rescales them
    scale = "1 - distance of the mean brightness"
    batch_size = 16  # most images per call

    # Keyword-only parameters are the options of the config; a typo there is an error before anything runs.
    # A model goes here: add `device: str = "cpu"` and mmalign fills it in.
    def __init__(self, *, target: float = 0.5) -> None:
        self.target = target

    # images: list of RGB PIL images. prompts: list of str. Add a parameter with the name of a column of your data, and
    # it arrives as a list with one value per image.
    def __call__(self, images, prompts):
        scores = []
        for image in images:
            brightness = np.asarray(image).mean() / 255
            scores.append(1 - abs(brightness - self.target))  # None where an image cannot be scored, never 0
        return scores
'''
