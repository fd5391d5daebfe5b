"""`mmalign score`: one line per image, broken ones included; files appear only when complete."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from mmalign.reward import RewardError
from mmalign.scoring import read_items, score_data
from mmalign.types import DataError

BRIGHTNESS = """
    def brightness(images):
        return [np.asarray(image).mean() / 255 for image in images]
"""


@pytest.fixture
def brightness(reward_file) -> str:
    return f"{reward_file(BRIGHTNESS)}:brightness"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good images, a truncated one and a text file in disguise; one good image in a sub-folder."""
    root = tmp_path / "images"
    (root / "deeper").mkdir(parents=True)
    Image.new("RGB", (32, 32), (255, 255, 255)).save(root / "white.png")
    Image.new("L", (32, 48), 0).save(root / "black.jpg")
    Image.new("RGB", (32, 32), (51, 51, 51)).save(root / "deeper" / "dark.webp", lossless=True)
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    (root / "cut.png").write_bytes(buffer.getvalue()[:400])
    (root / "text.jpeg").write_text("no image")
    (root / "notes.md").write_text("not an image by name either")
    return root


def run(*args, **options) -> tuple[int, list[dict]]:
    stream = io.StringIO()
    code = score_data(*args, stream=stream, **options)
    return code, [json.loads(line) for line in stream.getvalue().splitlines()]


def test_folder_with_broken_images_keeps_every_line_and_says_so(brightness: str, folder: Path, capsys):
    code, rows = run(brightness, folder, batch_size=2)
    by_id = {row["id"]: row for row in rows}
    assert code == 1
    assert list(by_id) == sorted(by_id) == ["black.jpg", "cut.png", "deeper/dark.webp", "text.jpeg", "white.png"]
    assert {key: row["score"] for key, row in by_id.items()} == {
        "black.jpg": pytest.approx(0.0, abs=1e-3),
        "cut.png": None,
        "deeper/dark.webp": pytest.approx(0.2),
        "text.jpeg": None,
        "white.png": pytest.approx(1.0),
    }
    assert "cut.png" in by_id["cut.png"]["error"]
    assert "text.jpeg" in by_id["text.jpeg"]["error"]
    assert by_id["white.png"]["error"] is None
    row = by_id["white.png"]
    assert list(row) == ["id", "path", "prompt", "score", "sub_scores", "error", "reward", "fingerprint"]
    assert (row["prompt"], row["reward"], row["path"]) == ("", "brightness", str(folder / "white.png"))
    assert len({row["fingerprint"] for row in rows}) == 1
    assert "brightness: 3 of 5 images scored, mean 0.4" in capsys.readouterr().err


def test_single_image(brightness: str, folder: Path, world, tmp_path: Path):
    code, rows = run(brightness, folder / "white.png")
    assert (code, rows[0]["id"], rows[0]["score"]) == (0, "white.png", pytest.approx(1.0))
    with pytest.raises(RewardError, match=r"needs prompts, and .*white\.png has none"):
        run("synthetic_truth", folder / "white.png")
    world.images[0].save(tmp_path / "scene.png")
    (tmp_path / "scene.txt").write_text(world.prompts[0])
    assert run("synthetic_truth", tmp_path / "scene.png")[1][0]["sub_scores"]["all_right"] == 1.0


def test_good_folder_exits_with_zero(brightness: str, folder: Path):
    (folder / "cut.png").unlink()
    (folder / "text.jpeg").unlink()
    assert run(brightness, folder)[0] == 0


def test_reward_that_needs_prompts_says_so_on_a_folder_without(folder: Path):
    with pytest.raises(RewardError, match=r"reward 'synthetic_truth' needs prompts, and .*images has none; put"):
        run("synthetic_truth", folder)


def test_undeclared_reward_with_prompts_runs_with_a_warning(reward_file, folder: Path, capsys):
    path = reward_file("def f(images, prompts): return [float(len(p)) for p in prompts]")
    assert [row["score"] for row in run(f"{path}:f", folder)[1]] == [0.0, None, 0.0, None, 0.0]
    assert "reward 'f' gets empty ones. Declare `needs_prompt = False`" in capsys.readouterr().err
    silent = reward_file("def f(images, prompts): return [0.0] * len(images)\nf.needs_prompt = False", "silent.py")
    run(f"{silent}:f", folder)
    assert "needs_prompt" not in capsys.readouterr().err


def test_prompts_beside_the_images(world, tmp_path: Path):
    for n, (image, prompt) in enumerate(zip(*world, strict=True)):
        image.save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text(prompt + "\n")
    code, rows = run("synthetic_truth", tmp_path)
    assert code == 0
    assert [row["prompt"] for row in rows] == world.prompts
    assert {row["sub_scores"]["all_right"] for row in rows} == {1.0}
    assert rows[0]["sub_scores"]["count"] is None
    (tmp_path / "3.txt").unlink()
    code, rows = run("synthetic_truth", tmp_path)
    assert code == 1
    assert [n for n, row in enumerate(rows) if row["score"] is None] == [3]
    assert "prompt" in rows[3]["error"]


def test_jsonl_with_paths_base64_and_columns(reward_file, world, tmp_path: Path):
    path = reward_file("def f(images, prompts, answer): return [a * len(p) for a, p in zip(answer, prompts)]")
    buffer = io.BytesIO()
    world.images[1].save(buffer, "PNG")
    world.images[0].save(tmp_path / "a.png")
    lines = [
        {"id": "first", "image": "a.png", "prompt": "abc", "answer": 2},
        {"image": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), "prompt": "é", "answer": 5},
        {"image": "missing.png", "prompt": "abc", "answer": 1},
        {"image": "a.png", "prompt": 7, "answer": 1},
        {"picture": "a.png", "prompt": "abc", "answer": 1},
    ]
    data = tmp_path / "rows.jsonl"
    text = "\n".join(json.dumps(line) for line in lines) + "\n{broken\n"
    data.write_text(text)
    code, rows = run(f"{path}:f", data)
    assert code == 1
    assert [row["score"] for row in rows] == [6.0, 5.0, None, None, None, None]
    assert (rows[0]["id"], rows[0]["path"], rows[1]["id"]) == ("first", str(tmp_path / "a.png"), f"{data}:2")
    for row, part in zip(rows[2:], ["missing.png", "'prompt' is 7", "no image", "not valid JSON"], strict=True):
        assert part in row["error"]


def test_own_output_can_be_scored_again(brightness: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder.parent)  # a relative folder must not make the paths relative to it
    folder = Path(folder.name)
    out = tmp_path / "scores.jsonl"
    score_data(brightness, folder, out)
    again = run(brightness, out)[1]
    first = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["score"] for row in again] == [row["score"] for row in first]
    assert [row["id"] for row in again] == [row["id"] for row in first]


def test_preference_pairs_give_two_lines_and_the_share_of_wins(brightness: str, tmp_path: Path, capsys):
    levels = {"a": (200, 100), "b": (50, 150), "c": (90, 90)}
    for side, position in (("w", 0), ("l", 1)):
        (tmp_path / "pairs" / side).mkdir(parents=True)
        for name, pair in levels.items():
            size = 32 + position  # equal pixels, unequal files
            Image.new("RGB", (size, size), (pair[position],) * 3).save(tmp_path / "pairs" / side / f"{name}.png")
            (tmp_path / "pairs" / side / f"{name}.txt").write_text("grey")
    code, rows = run(brightness, tmp_path / "pairs")
    assert code == 0
    assert [(row["id"], row["side"]) for row in rows] == [(n, s) for n in "abc" for s in ("chosen", "rejected")]
    assert rows[0]["score"] == pytest.approx(200 / 255)
    assert rows[1]["path"] == str(tmp_path / "pairs" / "l" / "a.png")
    assert "chosen beats rejected in 50.0 % of 3 pairs" in capsys.readouterr().err


def test_bad_pair_keeps_a_line(brightness: str, tmp_path: Path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    Image.new("RGB", (32, 32), (9, 9, 9)).save(tmp_path / "b.png")
    data = tmp_path / "pairs.jsonl"
    good = {"prompt": "x", "chosen": "a.png", "rejected": "b.png"}
    data.write_text("\n".join(json.dumps(row) for row in (good, {**good, "rejected": "gone.png"})))
    code, rows = run(brightness, data)
    assert code == 1
    assert len(rows) == 3
    assert "gone.png" in rows[2]["error"]


def test_limit_and_formats_are_checked(brightness: str, folder: Path, tmp_path: Path):
    assert len(run(brightness, folder, limit=2)[1]) == 2
    with pytest.raises(ValueError, match="unknown reader 'folder'"):
        run(brightness, folder, format="folder")
    with pytest.raises(ValueError, match="does not exist"):
        run(brightness, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        run(brightness, tmp_path / "empty")


def test_file_is_complete_or_not_there(reward_file, folder: Path, tmp_path: Path):
    out = tmp_path / "out" / "scores.jsonl"
    path = reward_file("""
        def fails_late(images):
            if np.asarray(images[0]).mean() > 100:
                raise RuntimeError("late")
            return [0.0] * len(images)

        def works(images):
            return [0.0] * len(images)
    """)
    with pytest.raises(RewardError, match=r"reward 'fails_late' failed .* RuntimeError: late"):
        score_data(f"{path}:fails_late", folder, out, batch_size=1)
    assert list(out.parent.iterdir()) == []
    assert score_data(f"{path}:works", folder, out) == 1
    assert list(out.parent.iterdir()) == [out]
    before = out.read_bytes()
    assert len(before.splitlines()) == 5
    with pytest.raises(RewardError):
        score_data(f"{path}:fails_late", folder, out, batch_size=1)
    assert out.read_bytes() == before
    assert out.stat().st_mode & 0o077 == (folder / "white.png").stat().st_mode & 0o077


def test_unwritable_out_is_an_error(brightness: str, folder: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        score_data(brightness, folder, tmp_path / "file" / "out.jsonl")


def test_items_are_read_lazily(tmp_path: Path):
    """A folder of broken files costs nothing until an image is opened."""
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(b"")
    items = list(read_items(tmp_path))
    assert [item.id for item in items] == ["0.png", "1.png", "2.png"]
    with pytest.raises(DataError, match="empty"):
        items[0].image.open()


# --- answers ----------------------------------------------------------------------------------------------------------


def answer_lines(out) -> list[dict]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_both_answers_of_a_pair_are_scored():
    out, console = io.StringIO(), Console(file=io.StringIO())
    code = score_data("synthetic_answers", "builtin:synthetic_answers", stream=out, limit=6, console=console)
    lines = answer_lines(out)
    assert code == 0
    assert [line["side"] for line in lines] == ["chosen", "rejected"] * 3
    assert [line["score"] == 1 for line in lines] == [True, False] * 3
    assert all(line["response"] and "<image>" in line["prompt"] for line in lines)
    assert "6 of 6 answers scored" in console.file.getvalue()
    assert "chosen beats rejected in 100.0 % of 3 pairs" in console.file.getvalue()


def test_reward_of_images_refuses_answers_and_the_other_way_round(tmp_path):
    with pytest.raises(RewardError, match=r"scores images, and builtin:synthetic_answers holds answers"):
        score_data("synthetic_truth", "builtin:synthetic_answers", stream=io.StringIO(), limit=2)
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    with pytest.raises(RewardError, match=r"'synthetic_answers' scores answers, and .* holds images"):
        score_data("synthetic_answers", tmp_path, stream=io.StringIO())


def test_answer_about_a_broken_image_keeps_its_line(tmp_path):
    (tmp_path / "0.png").write_bytes(b"junk")
    line = {"images": ["0.png"], "prompt": "what ?", "chosen": "there is a red circle .", "rejected": "no"}
    (tmp_path / "a.jsonl").write_text(json.dumps({**line, "truth": "there is a red circle ."}))
    out = io.StringIO()
    assert score_data("synthetic_answers", tmp_path / "a.jsonl", stream=out) == 1
    assert all(line["score"] is None and "not an image" in line["error"] for line in answer_lines(out))
