"""What the documentation names exists: links, commands, configs, keys, rows for every method."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mmalign.builtin import builtin_path
from mmalign.config import DataConfig, load_config
from mmalign.data.load import load_rows
from mmalign.data.questions import SCENES
from mmalign.registry import TABLES
from mmalign.synthetic.pairs import PAIR_KINDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")] if path.is_file()
)
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}


def fences(text: str, *languages: str) -> list[str]:
    """The bodies of ```language blocks."""
    return [body for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if language in languages]


def commands(text: str) -> list[str]:
    """`mmalign …` command lines in shell blocks, continuation lines joined, comments dropped."""
    found = []
    for block in fences(text, "", "bash", "sh", "console", "shell"):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\s#.*", "", line.strip().removeprefix("$ "))
            if match := re.match(
                r"(?:\S+=\S+ )*(?:accelerate launch (?:-\S+ )*-m |python -m |\S*/)?mmalign (.*)", line
            ):
                found.append(match[1])
    return found


def known_commands() -> set[str]:
    import typer

    from mmalign.cli import app

    root = typer.main.get_command(app)
    names = set()
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        names |= {name} | {f"{name} {sub}" for sub in getattr(command, "commands", {})}
    return names


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page: str):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", TEXT[page])
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    assert [target for target in local if not ((ROOT / page).parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_configs_exist(page: str):
    known = known_commands()
    for command in commands(TEXT[page]):
        words = command.split()
        name = words[0] if words[0] in known or len(words) == 1 else " ".join(words[:2])
        assert name in known or name.startswith("-"), f"mmalign {command}"
    for config in set(re.findall(r"\bconfigs/[\w./-]+\.yaml", TEXT[page])):
        assert (ROOT / config).is_file(), config


@pytest.mark.parametrize("page", PAGES)
def test_bundled_models_and_prompts_exist(page: str):
    """Every `builtin:name` that a page shows is a bundled file, a kind of synthetic pairs or a list of questions."""
    kinds = set(PAIR_KINDS) | {spec.removeprefix("builtin:") for spec in SCENES}
    for name in set(re.findall(r"\bbuiltin:([a-z][\w-]*)", TEXT[page])) - kinds:
        assert builtin_path(f"builtin:{name}").exists()


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    used = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", TEXT[page], re.M))
    assert used - targets == set()


@pytest.fixture
def files_of_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that a page shows: python blocks that open with `# NAME.py`."""
    for block in fences(TEXT[page], "python"):
        if match := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / match[1]).write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("files_of_page")
@pytest.mark.parametrize("page", PAGES)
def test_yaml_blocks_are_valid_configs(page: str):
    """A block with top-level sections is laid over a minimal config and must pass the strict schema."""
    for block in fences(TEXT[page], "yaml"):
        tree = yaml.safe_load(block)
        load_config(merged(MINIMAL, tree))


@pytest.mark.parametrize("page", PAGES)
def test_overrides_name_real_keys(page: str):
    """`section.key=value` in a command is accepted by the schema; placeholders (<…>, …) are left alone."""
    for command in commands(TEXT[page]):
        pairs = re.findall(r"(?<!\S)((?:\w+\.)*\w+=(?:\"[^\"]*\"|'[^']*'|\S+))", command)
        pairs = [pair.replace('"', "").replace("'", "") for pair in pairs]
        load_config(MINIMAL, [pair for pair in pairs if "<" not in pair and "…" not in pair])


MINIMAL: dict[str, Any] = {
    "model": {"family": "sdxl", "path": "some/model"},
    "method": {"preset": "diffusion_dpo"},
    "data": {"path": "some/data"},
    "train": {"steps": 1, "batch_size": 1, "learning_rate": 1e-5},
    "output_dir": "runs/x",
}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict) and key != "method"
        result[key] = merged(result[key], value) if both else value
    return result


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/your_own_reward.md"])
def test_reward_of_the_guide_passes_its_own_check(page: str, files_of_page: Path, mmalign_cli: Any):
    assert "mmalign rewards check ./brightness.py:brightness" in TEXT[page]
    done = mmalign_cli("rewards", "check", "./brightness.py:brightness", cwd=files_of_page)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", ["docs/your_own_pairs.md"])
def test_reader_and_folders_of_the_guide_work(page: str, files_of_page: Path):
    for side in ("w", "l", "a", "b"):
        (files_of_page / "pairs" / side).mkdir(parents=True)
        Image.new("RGB", (16, 16), "red" if side in "wa" else "blue").save(files_of_page / "pairs" / side / "fox.png")
    for prompt in ("pairs/fox.txt", "pairs/w/fox.txt"):
        (files_of_page / prompt).write_text("a red fox")
    for form in ("folders", "auto", "./my_reader.py:read_ratings"):
        (row,) = load_rows(DataConfig(path="pairs", format=form), seed=0).rows
        assert row.prompt == "a red fox"
        assert row.rejected is not None
        assert row.chosen.open().getpixel((0, 0)) == (255, 0, 0)
        assert row.rejected.open().getpixel((0, 0)) == (0, 0, 255)


def test_every_loss_and_preset_has_a_row_in_methods():
    text = TEXT["docs/methods.md"]
    presets = {path.stem for path in (ROOT / "configs" / "presets").glob("*.yaml")}
    assert {name for name in presets | set(TABLES["loss"]) if f"`{name}`" not in text} == set()


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_no_machine(page: str):
    """No home folders and no host that only some machines can reach."""
    assert re.findall(r"(?<![\w.~-])/(?:home|root|Users|work|mnt)/\w+", TEXT[page]) == []
    assert re.findall(r"\blocalhost\b|\b\d{1,3}(?:\.\d{1,3}){3}\b", TEXT[page]) == []


def test_helpers_see_what_they_should():
    text = "```bash\nmmalign train a.yaml \\\n  train.steps=1  # why\n$ .venv/bin/mmalign doctor\n```\n"
    text += "```yaml\na: 1\n```\n"
    assert [command.split() for command in commands(text)] == [["train", "a.yaml", "train.steps=1"], ["doctor"]]
    assert fences(text, "yaml") == ["a: 1\n"]
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}
