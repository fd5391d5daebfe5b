"""The wheel: what it holds, and that it works where there is no checkout.

Interpreters are started with `-S` and an explicit path, so that the editable install of this checkout, which hooks
itself in through site-packages, cannot lend the wheel a module that it lacks.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = ("mmalign", "rewards", "trainers", "configs", "assets")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a checkout holds: building leaves files beside the sources."""
    copy = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", ".work"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy / file)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    return target


def run(installed: Path, cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Python with the wheel and its dependencies, and nothing of this checkout, on the path."""
    paths = os.pathsep.join([str(installed), sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]])
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, "-S", *args], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_wheel_holds_every_module_config_and_asset(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = set()
    mapping = PYPROJECT["tool"]["setuptools"]["package-dir"]
    for package in PYPROJECT["tool"]["setuptools"]["packages"]:
        folder = mapping.get(package, package.replace(".", "/"))
        expected |= {f"{package.replace('.', '/')}/{path.name}" for path in (ROOT / folder).glob("*.py")}
    for folder, suffixes in (("configs", {".yaml"}), ("assets", {".json", ".safetensors", ".txt", ".md"})):
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT)
            if path.suffix in suffixes and inside.parts[:2] != ("assets", "build"):
                expected.add(f"mmalign/{inside.as_posix()}")
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "mmalign").rglob("*.html")}
    assert expected - names == set()


def test_wheel_holds_nothing_else(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    strays = [name for name in names if not name.startswith(("mmalign/", f"mmalign-{version(wheel)}.dist-info/"))]
    assert strays == []
    assert [name for name in names if name.startswith("mmalign/assets/build/")] == []
    assert any(name.endswith("licenses/LICENSE") for name in names)


def version(wheel: Path) -> str:
    return wheel.name.split("-")[1]


def test_installed_wheel_is_complete_without_the_checkout(installed: Path, tmp_path: Path):
    """Everything a user can name resolves, and every module comes out of the wheel."""
    code = """
import json, os, sys
import mmalign
from mmalign import builtin, config, registry
from mmalign.data import questions
from importlib.resources import files
for kind, table in registry.TABLES.items():
    for name in table:
        registry.resolve(kind, name)
shipped = sorted(str(p.relative_to(str(files("mmalign.configs")))) for p in files("mmalign.configs").rglob("*.yaml"))
loaded = [config.load_config(name).config for name in shipped if not name.startswith("presets")]
builtins = {c.model.path for c in loaded if c.model.path.startswith("builtin:")}
builtins |= {c.evaluate.prompts for c in loaded if (c.evaluate.prompts or "").startswith("builtin:")}
for name in builtins - set(questions.SCENES):  # scenes are drawn, not read
    builtin.builtin_path(name)
ours = [name for name in sys.modules if name.split(".")[0] == "mmalign" and sys.modules[name].__file__]
modules = {name: sys.modules[name].__file__ for name in ours}
print(json.dumps({"configs": len(loaded), "builtins": len(builtins), "modules": modules}))
"""
    done = run(installed, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["configs"] >= 1
    assert result["builtins"] >= 1
    assert {n: f for n, f in result["modules"].items() if not f.startswith(str(installed))} == {}


def test_installed_command_answers(installed: Path, tmp_path: Path):
    done = run(installed, tmp_path, "-m", "mmalign", "--help")
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


def test_command_from_inside_a_checkout_works_or_says_why(installed: Path, source: Path):
    """With only a wheel installed, `python -m mmalign` there finds the folder `mmalign` first: half a package."""
    config = next(p.relative_to(source) for p in sorted((source / "configs" / "synthetic").glob("*.yaml")))
    done = run(installed, source, "-m", "mmalign", "explain", str(config))
    if done.returncode != 0:
        assert "Traceback" not in done.stderr, done.stderr
        assert "pip install -e" in done.stderr, done.stderr
