"""What is wrong with a training set, and how wrong: counts, sizes, lengths, duplicates, contradictions, broken images.

`mmalign data check` prints the audit and writes `audit.json`. Every image is read and decoded once. A finding of
severity `error` would stop training; a `warning` would not, but is worth a look.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mmalign.data.fields import BadRow
from mmalign.data.load import images_of, map_threaded, read_rows
from mmalign.data.texts import response_problem
from mmalign.types import DataError, ImageRef, Row

if TYPE_CHECKING:
    from rich.table import Table

    from mmalign.config import DataConfig

Severity = Literal["error", "warning"]
NUM_EXAMPLES = 5


@dataclass(frozen=True)
class Finding:
    """One kind of problem. `count` rows have it; `examples` names the first few by file and index."""

    kind: str
    severity: Severity
    count: int
    meaning: str
    examples: list[str]


@dataclass(frozen=True)
class Spread:
    """Smallest, median, 95th percentile, largest and mean of a quantity."""

    low: float
    median: float
    high_95: float
    high: float
    mean: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        if not values:
            return None
        array = np.asarray(values, dtype=np.float64)
        median, high_95 = np.percentile(array, [50, 95])
        return cls(float(array.min()), float(median), float(high_95), float(array.max()), float(array.mean()))


@dataclass(frozen=True)
class Audit:
    """The result.

    Args:
        source: data path.
        counts: `rows`, `paired`, `prompts` and `images` (different ones), and the reader's counts.
        prompt_words, prompt_chars: lengths over rows.
        chosen_words, rejected_words: lengths of text responses; None for images.
        longer_chosen_share: share of text pairs whose chosen response has more words than the rejected one, ties at
            ½. Far from 0.5, length alone tells which is preferred, and a model learns that first.
        image_height, image_width: pixels, over different images.
        image_sizes: the ten most frequent "WIDTHxHEIGHT" with their counts.
        resolution: training size that `upsampled_share` refers to; None if not given.
        upsampled_share: share of different images whose short side is below `resolution`.
        findings: problems, errors first.
    """

    source: str
    counts: dict[str, int]
    prompt_words: Spread | None
    prompt_chars: Spread | None
    chosen_words: Spread | None
    rejected_words: Spread | None
    longer_chosen_share: float | None
    image_height: Spread | None
    image_width: Spread | None
    image_sizes: dict[str, int]
    resolution: int | None
    upsampled_share: float | None
    findings: list[Finding] = field(default_factory=list)

    @property
    def has_errors(self) -> bool:
        return any(finding.severity == "error" for finding in self.findings)

    def finding(self, kind: str) -> Finding | None:
        return next((finding for finding in self.findings if finding.kind == kind), None)

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "has_errors": self.has_errors}, indent=2, ensure_ascii=False)

    def to_table(self) -> Table:
        """For `rich.console.Console.print`."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(f"data check: {self.source}"), title_justify="left", show_header=False)
        table.add_column("what", no_wrap=True)
        table.add_column("value")
        table.add_row("counts", ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in self.counts.items()))
        for name, spread in (
            ("prompt words", self.prompt_words),
            ("prompt characters", self.prompt_chars),
            ("words in chosen", self.chosen_words),
            ("words in rejected", self.rejected_words),
            ("image height", self.image_height),
            ("image width", self.image_width),
        ):
            if spread is not None:
                text = f"{spread.low:g} … {spread.high:g}, median {spread.median:g}, 95 % up to {spread.high_95:g}"
                table.add_row(name, text)
        if self.longer_chosen_share is not None:
            table.add_row("chosen is longer", f"in {self.longer_chosen_share:.1%} of the pairs")
        if self.image_sizes:
            table.add_row("frequent sizes", ", ".join(f"{size}: {count:,}" for size, count in self.image_sizes.items()))
        if self.upsampled_share is not None:
            table.add_row(f"below {self.resolution} px", f"{self.upsampled_share:.1%} of the images are enlarged")
        for finding in self.findings:
            colour = "red" if finding.severity == "error" else "yellow"
            examples = escape("; ".join(finding.examples))
            text = f"{finding.count:,} rows: {escape(finding.meaning)}. First: {examples}"
            table.add_row(f"[{colour}]{finding.severity}: {finding.kind}[/]", text)
        if not self.findings:
            table.add_row("[green]findings[/]", "none")
        return table


def check_data(
    config: DataConfig,
    *,
    resolution: int | None = None,
    cut_prompts: Callable[[Iterable[str]], set[str]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Read everything a config's `data` section names and audit it; bad rows become findings instead of errors.

    Args:
        resolution: training size in pixels, where `config.resolution` leaves it to the model.
        cut_prompts: those of some prompts that are too long for the model (`DiffusionPolicy.cut_prompts`).

    Raises `DataError` when the data cannot be read at all, `ValueError` on an unknown reader or option.
    """
    rows, bad, counts = read_rows(config, stop_at_bad=False)
    kept = {name: value for name, value in counts.items() if name not in ("rows", "bad", "swapped", "noisy")}
    return audit_rows(
        rows,
        source=config.path,
        counts=kept,
        bad=bad,
        resolution=config.resolution or resolution,
        cut_prompts=cut_prompts,
        progress=progress,
    )


def audit_rows(
    rows: Sequence[Row],
    *,
    source: str = "",
    counts: Mapping[str, int] | None = None,
    bad: Sequence[BadRow] = (),
    resolution: int | None = None,
    cut_prompts: Callable[[Iterable[str]], set[str]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Audit rows that are already read.

    Args:
        source: name for the title.
        counts: of the reader (`ties_dropped` …), to show.
        bad: rows the reader could not use.
        resolution: training size in pixels.
        cut_prompts: those of some prompts that are too long for the model.
        progress: called with (rows done, rows in all).
    """
    collected = _Collected()
    for number, (row, looks) in enumerate(zip(rows, map_threaded(_look_at_row, rows), strict=True), start=1):
        collected.add(row, looks)
        if progress is not None:
            progress(number, len(rows))
    sizes = list(collected.sizes.values())
    below = [] if resolution is None else [size for size in sizes if min(size) < resolution]
    frequent = Counter(f"{width}x{height}" for height, width in sizes).most_common(10)
    chosen, rejected = ([len(text.split()) for text in texts] for texts in _text_responses(rows))
    return Audit(
        source=source,
        counts={
            "rows": len(rows),
            "paired": sum(row.rejected is not None for row in rows),
            "prompts": len({row.prompt for row in rows}),
            "images": len(sizes),
            **(counts or {}),
        },
        prompt_words=Spread.of([len(row.prompt.split()) for row in rows]),
        prompt_chars=Spread.of([len(row.prompt) for row in rows]),
        chosen_words=Spread.of(chosen),
        rejected_words=Spread.of(rejected),
        longer_chosen_share=_longer_share(rows),
        image_height=Spread.of([height for height, _ in sizes]),
        image_width=Spread.of([width for _, width in sizes]),
        image_sizes=dict(frequent),
        resolution=resolution,
        upsampled_share=len(below) / len(sizes) if resolution is not None and sizes else None,
        findings=_findings(rows, bad, collected, resolution, cut_prompts),
    )


@dataclass(frozen=True)
class _Look:
    """What reading one image gave."""

    digest: str = ""
    size: tuple[int, int] = (0, 0)
    problem: str = ""


def _text_responses(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """All chosen and all rejected responses that are text."""
    chosen = [row.chosen for row in rows if isinstance(row.chosen, str)]
    return chosen, [row.rejected for row in rows if isinstance(row.rejected, str)]


def _longer_share(rows: Sequence[Row]) -> float | None:
    pairs = [(row.chosen, row.rejected) for row in rows]
    lengths = [(len(a.split()), len(b.split())) for a, b in pairs if isinstance(a, str) and isinstance(b, str)]
    if not lengths:
        return None
    return sum(1.0 if first > second else 0.5 if first == second else 0.0 for first, second in lengths) / len(lengths)


def _look_at_row(row: Row) -> dict[int, _Look]:
    """What each image of the row is, by the identity of its reference."""
    return {id(ref): _look(ref) for ref in images_of(row)}


def _look(ref: ImageRef) -> _Look:
    try:
        image = ref.open()
        return _Look(ref.digest(), (image.height, image.width))
    except DataError as error:
        return _Look(problem=str(error))


@dataclass
class _Collected:
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    identical: list[str] = field(default_factory=list)
    duplicate: list[str] = field(default_factory=list)
    contradicting: list[str] = field(default_factory=list)
    small: list[tuple[str, int]] = field(default_factory=list)
    _pairs: dict[tuple[Any, ...], str] = field(default_factory=dict)
    _preferred: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def add(self, row: Row, looks: Mapping[int, _Look]) -> None:
        problems = [look.problem for look in looks.values() if look.problem]
        self.unreadable += problems[:1]
        self.sizes.update({look.digest: look.size for look in looks.values() if not look.problem})
        if problems:
            return
        drawn = [looks[id(side)].size for side in (row.chosen, row.rejected) if isinstance(side, ImageRef)]
        if drawn:
            self.small.append((row.source, min(map(min, drawn))))
        sides = [_content(side, looks) for side in (row.chosen, row.rejected) if side is not None]
        if len(sides) == 2 and sides[0] == sides[1]:
            self.identical.append(row.source)
            return
        problem = response_problem(row) if isinstance(row.chosen, str) else None
        if problem is not None:
            self.unusable.append(f"{row.source}: {problem}")
            return
        shown = tuple(_content(ref, looks) for ref in row.images)
        key = (row.history, row.prompt, shown, *sides)
        if key in self._pairs:
            self.duplicate.append(f"{row.source} repeats {self._pairs[key]}")
            return
        self._pairs[key] = row.source
        if len(sides) == 2 and row.preference != 0.5:
            opposite = self._preferred.get((row.history, row.prompt, shown, *reversed(sides)))
            if opposite is not None:
                self.contradicting.append(f"{row.source} against {opposite}")
            self._preferred[key] = row.source


def _content(side: ImageRef | str, looks: Mapping[int, _Look]) -> tuple[str, str]:
    """Identity of an image or a text."""
    return ("text", side) if isinstance(side, str) else ("image", looks[id(side)].digest)


def _findings(
    rows: Sequence[Row],
    bad: Sequence[BadRow],
    collected: _Collected,
    resolution: int | None,
    cut_prompts: Callable[[Iterable[str]], set[str]] | None,
) -> list[Finding]:
    cut = cut_prompts(row.prompt for row in rows) if cut_prompts is not None else set()
    ties = [row.source for row in rows if row.rejected is not None and row.preference == 0.5]
    small = [] if resolution is None else [source for source, side in collected.small if side < resolution]
    candidates: list[tuple[str, Severity, list[str], str]] = [
        ("no_rows", "error", [] if rows else ["the data set"], "no usable row is left"),
        ("bad_rows", "error", [str(row) for row in bad], "cannot be used; data.on_bad_row: skip leaves them out"),
        (
            "unreadable",
            "error",
            collected.unreadable,
            "an image cannot be decoded; data.on_bad_row: skip leaves them out",
        ),
        ("identical", "error", collected.identical, "chosen and rejected are the same text, or image byte for byte"),
        ("unusable", "error", collected.unusable, "cannot be answered in text"),
        (
            "only_ties",
            "error",
            ties if len(ties) == len(rows) else [],
            "every row is a tie: there is no preference to learn",
        ),
        (
            "contradicting",
            "warning",
            collected.contradicting,
            "another row prefers the other response under the same prompt; their gradients cancel",
        ),
        (
            "duplicate",
            "warning",
            collected.duplicate,
            "same prompt, images and responses as another row; it counts twice",
        ),
        (
            "empty_prompt",
            "warning",
            [row.source for row in rows if not row.prompt.strip()],
            "the prompt is empty, allowed by allow_empty_prompt",
        ),
        (
            "cut_prompt",
            "warning",
            [row.source for row in rows if row.prompt in cut],
            "the prompt is longer than any text encoder reads; its end is cut",
        ),
        ("ties", "warning", ties if len(ties) < len(rows) else [], "kept as ties with preference 0.5"),
        ("below_resolution", "warning", small, f"an image is enlarged to {resolution} px, which trains on blur"),
    ]
    return [
        Finding(kind, severity, len(places), meaning, places[:NUM_EXAMPLES])
        for kind, severity, places, meaning in candidates
        if places
    ]
