"""`builtin:NAME`: the bundled tiny models, prompt lists and other package data, addressed like any path."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from mmalign.registry import nearest

PREFIX = "builtin:"


def resolve_path(spec: str) -> str:
    """`spec` itself (hub id or path), or the local folder behind `builtin:NAME`."""
    return str(builtin_path(spec)) if spec.startswith(PREFIX) else spec


def builtin_path(spec: str) -> Path:
    """The file or folder behind `builtin:NAME`. Raises `ValueError` with the bundled names."""
    name = spec.removeprefix(PREFIX)
    root = Path(str(files("mmalign.assets")))
    for candidate in (root / name, root / "prompts" / f"{name}.txt"):
        if name and candidate.exists():
            return candidate
    folders = [path.name for path in root.iterdir() if path.is_dir() and (path / "card.json").is_file()]
    prompts = [path.stem for path in (root / "prompts").glob("*.txt")]
    known = sorted(folders + prompts)
    raise ValueError(f"{spec!r} is not bundled{nearest(name, known)}. Bundled: {', '.join(PREFIX + k for k in known)}")


def bundled_data() -> list[str]:
    """Data sets and prompt lists that are bundled as files, as `builtin:NAME`."""
    root = Path(str(files("mmalign.assets")))
    sets = [path.parent.name for path in root.glob("*/*.parquet")]
    return sorted(PREFIX + name for name in [*sets, *(path.stem for path in (root / "prompts").glob("*.txt"))])
