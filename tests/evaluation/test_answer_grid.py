"""The picture of questions and answers: text inside its cells, styles where they belong, read back from the pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from mmalign.evaluation import answer_grid, drawing
from mmalign.evaluation.answer_grid import ANSWER_WIDTH, MAX_LINES, AnswerRow, changed_spans, save_answer_grid
from mmalign.evaluation.drawing import CellScore, text_width


def flat(color: str, size: tuple[int, int] = (48, 48)) -> Image.Image:
    return Image.new("RGB", size, color)


def draw(folder: Path, *rows: AnswerRow, labels: tuple[str, ...] = ("base", "tuned")) -> np.ndarray:
    save_answer_grid(folder / "grid.png", rows, labels)
    return np.asarray(Image.open(folder / "grid.png").convert("RGB"))


def count(picture: np.ndarray, color: str) -> int:
    return int((picture == ImageColor.getrgb(color)).all(axis=-1).sum())


def test_tiny_images_are_enlarged_by_a_whole_factor(tmp_path: Path) -> None:
    picture = draw(tmp_path, AnswerRow("q", [flat("#ff0000")], ["a", "b"]))
    assert count(picture, "#ff0000") == (48 * 4) ** 2
    # Three images share the square of one.
    three = draw(tmp_path, AnswerRow("q", [flat("#ff0000"), flat("#00ff00"), flat("#0000ff")], ["a", "b"]))
    assert count(three, "#ff0000") == count(three, "#00ff00") == count(three, "#0000ff") == (48 * 2) ** 2
    assert three.shape == picture.shape
    # Without any image the row is as high as its words.
    assert draw(tmp_path, AnswerRow("q", [], ["a", "b"])).shape[0] < picture.shape[0]


def test_changed_words_are_shaded_and_bad_ones_red(tmp_path: Path) -> None:
    before, after = "a red circle", "a blue circle"
    same = draw(tmp_path, AnswerRow("q", [], [before, before], spans=changed_spans([before, before])))
    assert count(same, drawing.CHANGED) == count(same, drawing.LOSS) == 0
    changed = draw(tmp_path, AnswerRow("q", [], [before, after], spans=changed_spans([before, after])))
    columns = np.where((changed == ImageColor.getrgb(drawing.CHANGED)).all(axis=-1).any(axis=0))[0]
    # One shaded word on each side.
    assert np.ptp(columns) > ANSWER_WIDTH
    assert count(changed, drawing.LOSS) == 0
    bad = draw(tmp_path, AnswerRow("q", [], [before, after], spans=[[(2, 5, "bad")], []]))
    assert count(bad, drawing.LOSS) > 10
    assert count(bad, drawing.CHANGED) == 0


def test_gains_are_green_and_losses_red(tmp_path: Path) -> None:
    def scored(gain: float) -> np.ndarray:
        scores = [[CellScore("clip", 0.3)], [CellScore("clip", 0.3 + gain, gain, gain > 0)]]
        return draw(tmp_path, AnswerRow("q", [], ["a", "b"], scores=scores))

    up, down = scored(0.1), scored(-0.1)
    assert count(up, drawing.GAIN) > 5
    assert count(up, drawing.LOSS) == 0
    assert count(down, drawing.LOSS) > 5
    assert count(down, drawing.GAIN) == 0


@pytest.mark.parametrize(
    "text",
    ["", "   ", "a", "word " * 400, "x" * 3000, "赤" * 500, "a " + "y" * 90 + " b", "tab\tand\nline\n\nbreaks 🙂"],
)
def test_words_stay_in_their_cell(text: str) -> None:
    spans = [(0, min(len(text), 700), "changed"), (3, min(len(text), 9), "bad")] if len(text) > 9 else []
    lines = answer_grid._lay_out(text, spans)  # type: ignore[arg-type]
    assert 1 <= len(lines) <= MAX_LINES
    for line in lines:
        for word in line:
            assert word.x + text_width(word.text, drawing.PROMPT_PX) <= ANSWER_WIDTH + 1
    drawn = "".join(word.text for line in lines for word in line)
    if not text.strip():
        assert drawn == "(empty answer)"
    elif not drawn.endswith("…"):
        assert drawn == "".join(text.split())
    else:
        assert len(lines) == MAX_LINES
        assert "".join(text.split()).startswith(drawn.rstrip(" …"))


def test_pixel_cap_leaves_rows_out(tmp_path: Path) -> None:
    rows = [AnswerRow(f"question {n}", [flat("#123456")], ["a", "b"], truth="t") for n in range(40)]
    assert save_answer_grid(tmp_path / "all.png", rows, ("base", "tuned")) == 40
    shown = save_answer_grid(tmp_path / "some.png", rows, ("base", "tuned"), max_pixels=2_000_000)
    assert 1 <= shown < 40
    with Image.open(tmp_path / "some.png") as image:
        assert image.width * image.height <= 2_000_000


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'q' has 1 answers for 2 models"):
        save_answer_grid(tmp_path / "grid.png", [AnswerRow("q", [], ["a"])], ("base", "tuned"))
    with pytest.raises(ValueError, match="needs questions and models"):
        save_answer_grid(tmp_path / "grid.png", [], ("base",))
