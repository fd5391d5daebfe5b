"""The grid: sizes, colours and text where they belong, read back from the pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from mmalign.evaluation import drawing
from mmalign.evaluation.drawing import CellScore, fit, format_score, text_width, wrap
from mmalign.evaluation.grid import Cell, Column, save_grid


def flat(color: str, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, color)


def count(picture: np.ndarray, color: str) -> int:
    return int((picture == ImageColor.getrgb(color)).all(axis=-1).sum())


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_tiny_images_are_enlarged_by_a_whole_factor(tmp_path: Path) -> None:
    checker = Image.fromarray((np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)).convert("RGB")
    save_grid(tmp_path / "grid.png", ["a"], [Column("base", [Cell(checker)])])
    picture = read(tmp_path / "grid.png")
    # 64 px become 256 px: every source pixel is a pure 4 × 4 square, nothing in between.
    assert count(picture, "#000000") == 256 * 256 // 2


def test_image_may_be_a_file_and_sizes_may_differ(tmp_path: Path) -> None:
    flat("#ff0000", (300, 150)).save(tmp_path / "wide.png")
    columns = [
        Column("wide", [Cell(tmp_path / "wide.png")]),
        Column("tall", [Cell(flat("#0000ff", (150, 300)))]),
        Column("missing", [Cell(None)]),
    ]
    assert save_grid(tmp_path / "grid.png", ["a"], columns) == 1
    picture = read(tmp_path / "grid.png")
    assert count(picture, "#ff0000") == 300 * 150
    assert count(picture, "#0000ff") == 150 * 300
    # Centred: as much padding left of the tall image as right of it, in an equal cell.
    red, blue = (np.argwhere((picture == ImageColor.getrgb(c)).all(axis=-1)) for c in ("#ff0000", "#0000ff"))
    assert abs((red[:, 0].min() + red[:, 0].max()) - (blue[:, 0].min() + blue[:, 0].max())) <= 1


def test_gains_are_green_and_losses_red(tmp_path: Path) -> None:
    def render(gain: float | None, better: bool | None) -> np.ndarray:
        cell = Cell(flat("#808080"), [CellScore("clip", 0.3, gain, better)])
        save_grid(tmp_path / "grid.png", ["a"], [Column("after", [cell])])
        return read(tmp_path / "grid.png")

    up, down, none, tiny = render(0.1, True), render(-0.1, False), render(None, None), render(1e-9, True)
    assert count(up, drawing.GAIN) > 5
    assert count(up, drawing.LOSS) == 0
    assert count(down, drawing.LOSS) > 5
    assert count(down, drawing.GAIN) == 0
    # A difference that reads 0.000 is neither, and a baseline shows no difference at all.
    for picture in (none, tiny):
        assert count(picture, drawing.GAIN) + count(picture, drawing.LOSS) == 0


def test_pixel_cap_shrinks_cells_then_leaves_rows_out(tmp_path: Path) -> None:
    prompts = [f"prompt {n}" for n in range(40)]
    columns = [Column(f"m{m}", [Cell(flat("#123456", (256, 256)))] * 40) for m in range(4)]
    assert save_grid(tmp_path / "all.png", prompts, columns, max_pixels=12_000_000) == 40
    shown = save_grid(tmp_path / "some.png", prompts, columns, max_pixels=1_500_000)
    assert 1 <= shown < 40
    for name, cap in (("all", 12_000_000), ("some", 1_500_000)):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width * image.height <= cap
    with pytest.raises(ValueError, match="max_pixels = 1000"):
        save_grid(tmp_path / "none.png", prompts, columns, max_pixels=1000)
    assert not (tmp_path / "none.png").exists()


def test_wrap_fits_the_width_and_keeps_every_word() -> None:
    text = "a red circle " * 30 + "x" * 300
    lines = wrap(text, 19, 200)
    assert all(text_width(line, 19) <= 200 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    short = wrap(text, 19, 200, max_lines=3)
    assert len(short) == 3
    assert short[-1].endswith("…")
    assert wrap("", 19, 200) == [""]


def test_letters_outside_latin_are_drawn_when_a_font_has_them() -> None:
    if drawing._load("DejaVuSans.ttf", 20) is None:
        pytest.skip("no DejaVu Sans on this machine")
    font = drawing.font_for("красный круг", 20)
    assert bytes(font.getmask("к")) != bytes(font.getmask("\U0010ffff"))


@pytest.mark.parametrize(
    ("value", "sign", "text"),
    [
        (0.12345, False, "0.123"),
        (21.456, False, "21.46"),
        (123.4, False, "123.4"),
        (0.1, True, "+0.100"),
        (-0.1, True, "-0.100"),
        (-1e-6, True, "0.000"),
        (float("nan"), False, "n/a"),
    ],
)
def test_format_score(value: float, sign: bool, text: str) -> None:
    assert format_score(value, sign) == text


def test_fit_keeps_proportions() -> None:
    assert fit(flat("#000", (10, 20)), 100, 100).size == (50, 100)
    assert fit(flat("#000", (2000, 1000)), 100, 100).size == (100, 50)
    assert fit(flat("#000", (5000, 1)), 100, 100).size == (100, 1)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'base' has 1 cells for 2 prompts"):
        save_grid(tmp_path / "grid.png", ["a", "b"], [Column("base", [Cell(None)])])
    with pytest.raises(ValueError, match="needs prompts and columns"):
        save_grid(tmp_path / "grid.png", [], [])
