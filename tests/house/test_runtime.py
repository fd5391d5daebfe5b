"""Rules that hold for the running program: what an import loads, how fast `--help` is, one name for each file."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft", "open_clip", "datasets", "pyarrow", "matplotlib"}
HELP_SECONDS = 0.5


def installed_modules() -> list[str]:
    """Every module of every listed package, by its installed name."""
    names = []
    for package in SETUPTOOLS["packages"]:
        folder = ROOT / SETUPTOOLS["package-dir"].get(package, package.replace(".", "/"))
        names.append(package)
        names += [f"{package}.{path.stem}" for path in sorted(folder.glob("*.py")) if not path.stem.startswith("__")]
    return names


def run_python(code: str, *args: str, cwd: Path = ROOT) -> Any:
    """What `code` prints as JSON on its last line, in a fresh interpreter started in the repository root."""
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_module_imports_and_is_loaded_under_one_name():
    """All of them, and every registered name, in one process started where top-level `rewards` is importable too."""
    code = """
import importlib, json, os, sys, traceback
failed, files = {}, {}
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except Exception:
        failed[name] = traceback.format_exc(limit=-2)
from mmalign import registry
for kind, table in registry.TABLES.items():
    for name in table:
        try:
            registry.resolve(kind, name)
        except Exception as error:
            failed[f"{kind} {name}"] = str(error)
for name, module in list(sys.modules.items()):
    path = getattr(module, "__file__", None)
    if path and os.path.realpath(path).startswith(os.path.join(os.getcwd(), "")) and ".venv" not in path:
        files.setdefault(os.path.realpath(path), []).append(name)
print(json.dumps({"failed": failed, "twice": {p: n for p, n in files.items() if len(n) > 1}, "seen": len(files)}))
"""
    result = run_python(code, json.dumps(installed_modules()))
    assert result["failed"] == {}
    assert result["twice"] == {}
    assert result["seen"] >= len(installed_modules())


def test_importing_mmalign_is_light():
    code = "import mmalign, sys, json; print(json.dumps(sorted(sys.modules)))"
    loaded = set(run_python(code))
    assert "mmalign" in loaded
    assert loaded & HEAVY == set()
    assert {name for name in loaded if name.startswith(("mmalign.rewards", "mmalign.trainers"))} == set()


def test_help_loads_nothing_heavy():
    code = """
import json, sys
from mmalign.cli import main
sys.argv = ["mmalign", "--help"]
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
print(json.dumps(sorted(sys.modules)))
"""
    loaded = set(run_python(code))
    assert "mmalign.cli" in loaded
    assert loaded & HEAVY == set()


def test_help_answers_at_once():
    """Best of up to five, because the machine may be busy; one attempt within the budget is proof enough."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "mmalign", "--help"], cwd=ROOT, capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        if min(seconds) < HELP_SECONDS:
            break
    assert min(seconds) < HELP_SECONDS, seconds


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"]])
def test_python_m_mmalign_is_the_same_command(args: list[str]):
    console = Path(sys.executable).parent / "mmalign"
    outputs = [
        subprocess.run([*command, *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
        for command in ([str(console)], [sys.executable, "-m", "mmalign"])
    ]
    assert "train" in outputs[0]
    assert outputs[0] == " ".join(outputs[1]).replace("python -m mmalign", "mmalign").split()


def test_every_public_name_resolves():
    import mmalign

    assert {name for name in mmalign.__all__ if not callable(getattr(mmalign, name))} == set()
    with pytest.raises(AttributeError, match="no_such_name"):
        mmalign.no_such_name  # noqa: B018
