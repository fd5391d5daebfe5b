"""`mmalign explain`: where each resolved value came from, and the code that will run."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmalign import registry
from mmalign.config import Config, LoadedConfig, load_config

WIDE = 140  # columns from which the meaning of each key fits beside it


def explain(source: str, overrides: Sequence[str]) -> None:
    """Print every value with its origin and unit documentation, then the path from the command to the loss."""
    loaded = load_config(source, overrides)
    console = Console()
    wide = console.width >= WIDE
    table = Table("key", "value", "from", *(["meaning"] if wide else []), box=None, header_style="bold")
    for key, value, origin in loaded.values():
        cells = [key, repr(value), origin, *([first_sentence(documentation(key))] if wide else [])]
        table.add_row(*map(Text, cells), style="dim" if origin == "default" else "")
    console.print(table)
    console.print("\n[bold]path through the code[/]")
    for label, place in code_path(loaded):
        console.print(f"  {label:<10} {place}", highlight=False, soft_wrap=True)


def code_path(loaded: LoadedConfig) -> list[tuple[str, str]]:
    """(role, file:line) from the command to each loss, and the model's family."""
    config = loaded.config
    method_class = registry.resolve("method", config.method.name)
    loop = registry.resolve("loop", method_class.loop)
    method = method_class(**config.method.options())
    from mmalign import cli

    places = [
        ("command", location(cli.train)),
        ("loop", location(loop)),
        ("method", location(method_class)),
        *(("loss", f"{location(term.function.func)} {term.name}") for term in getattr(method, "terms", [])),
        *(("loss", f"{location(function)} {function.__name__}") for function in getattr(method, "step_losses", [])),
        ("model", location(registry.resolve("family", config.model.family))),
    ]
    return places


def location(thing: Any) -> str:
    """`file:line` relative to the current folder where possible."""
    path = Path(inspect.getsourcefile(thing) or "?").resolve()
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return f"{path}:{inspect.getsourcelines(thing)[1]}"


def documentation(key: str) -> str:
    """The docstring of a config key."""
    section: Any = Config
    text = ""
    for part in key.split("."):
        field = getattr(section, "model_fields", {}).get(part)
        if field is None:
            return text
        text = field.description or ""
        options = getattr(field.annotation, "__args__", (field.annotation,))
        section = next((option for option in options if hasattr(option, "model_fields")), None)
    return text


def first_sentence(text: str) -> str:
    return " ".join(text.split()).split(". ")[0]
