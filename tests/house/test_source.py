"""Rules that hold for the source text: who imports whom, what may be named where, how long a module may be.

Each rule is a function from source to a list of `file:line: problem`, tried here on a planted violation as well, so
that a rule that has stopped finding anything fails too.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGE_DIRS = {
    name: PYPROJECT["tool"]["setuptools"]["package-dir"].get(name, name.replace(".", "/"))
    for name in PYPROJECT["tool"]["setuptools"]["packages"]
}
MAX_LINES = 600
ASSET_BUDGET_BYTES = 32 * 2**20

Rule = Callable[[ast.Module, str], list[str]]


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "__pycache__" not in path.parts and ".work" not in path.parts:
                yield path


def module_of(path: Path) -> str:
    """`rewards/clip.py` -> `mmalign.rewards.clip`, as installed."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] != "mmalign":
        parts = ("mmalign", *parts)
    return ".".join(parts)


def violations(rule: Rule, *folders: str) -> list[str]:
    found = []
    for path in sources(*folders):
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        module = module_of(path)
        found += [f"{path.relative_to(ROOT)}:{problem}" for problem in rule(tree, module)]
    return found


def imports(tree: ast.Module, module: str) -> Iterator[tuple[ast.stmt, str]]:
    """Every imported name, absolute: `from . import a` in mmalign.x.y gives mmalign.x.a. Functions included."""
    package = module.removesuffix(".__init__") if module.endswith(".__init__") else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            yield node, base
            for alias in node.names:
                yield node, f"{base}.{alias.name}"


def below(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def docstrings(tree: ast.Module) -> set[int]:
    """Ids of the constants that are docstrings, of modules, classes, functions and fields."""
    return {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }


# --- who imports whom -------------------------------------------------------------------------------------------------


def core_imports_no_edge(tree: ast.Module, module: str) -> list[str]:
    edges = ("mmalign.rewards", "mmalign.trainers", "rewards", "trainers", "bench", "tests", "assets")
    return sorted({f"{node.lineno}: imports {name}" for node, name in imports(tree, module) if below(name, *edges)})


def core_reaches_edges_by_registry(tree: ast.Module, module: str) -> list[str]:
    if module == "mmalign.registry":
        return []
    skip = docstrings(tree)
    return [
        f"{node.lineno}: names {node.value!r}; only the registry does"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in skip
        and re.search(r"\bmmalign\.(rewards|trainers)\b", node.value)
    ]


def edges_import_neighbours_relatively(tree: ast.Module, module: str) -> list[str]:
    """Rewards and trainers know the core and their neighbours; never each other, never themselves by absolute name."""
    edges = ("mmalign.rewards", "mmalign.trainers", "rewards", "trainers")
    own = ".".join(module.split(".")[:2])
    found = set()
    for node, name in imports(tree, module):
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        if below(name, *edges) and not (relative and below(name, own)):
            found.add(f"{node.lineno}: imports {name}")
    return sorted(found)


distributions = functools.cache(packages_distributions)


def third_party_is_declared(tree: ast.Module, module: str) -> list[str]:
    project = PYPROJECT["project"]
    declared = [*project["dependencies"], *(r for rs in project["optional-dependencies"].values() for r in rs)]
    known = {canonicalize_name(Requirement(requirement).name) for requirement in declared}
    homes = distributions()
    # Scripts are run, not installed: their neighbours are top-level names.
    scripts = below(module, "mmalign.assets.build", "mmalign.bench")
    siblings = {path.stem for path in sources("assets/build", "bench")} if scripts else set()
    found = set()
    for node, name in imports(tree, module):
        top = name.split(".")[0]
        if top in sys.stdlib_module_names or top == "mmalign" or top in siblings:
            continue
        if not known & {canonicalize_name(home) for home in homes.get(top, [top])}:
            found.add(f"{node.lineno}: imports {top}, which pyproject.toml does not require")
    return sorted(found)


def test_core_imports_neither_rewards_nor_trainers():
    assert violations(core_imports_no_edge, "mmalign") == []


def test_core_reaches_rewards_and_trainers_only_through_the_registry():
    assert violations(core_reaches_edges_by_registry, "mmalign") == []


def test_neighbours_in_rewards_and_trainers_are_imported_relatively():
    assert violations(edges_import_neighbours_relatively, "rewards", "trainers") == []


def test_every_imported_library_is_declared():
    assert violations(third_party_is_declared, "mmalign", "rewards", "trainers", "bench", "assets/build") == []


# --- what is named where ----------------------------------------------------------------------------------------------


def words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Identifiers, keyword arguments, import targets and strings (docstrings aside), with their lines."""
    skip = docstrings(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name):
            yield line, node.id
        elif isinstance(node, ast.Attribute):
            yield line, node.attr
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield line, node.name
        elif isinstance(node, (ast.arg, ast.keyword)) and node.arg:
            yield line, node.arg
        elif isinstance(node, ast.alias):
            yield line, node.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield line, node.module
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skip:
            yield line, node.value


def names_none_of(forbidden: set[str]) -> Rule:
    pattern = re.compile(r"(?<![a-z0-9])(" + "|".join(sorted(map(re.escape, forbidden))) + r")(?![a-z0-9])")

    def rule(tree: ast.Module, module: str) -> list[str]:
        found = {f"{line}: names {hit[0]!r}" for line, word in words(tree) if (hit := pattern.search(word.lower()))}
        return sorted(found)

    return rule


def family_words() -> set[str]:
    from mmalign.registry import TABLES

    classes = {spec.rpartition(":")[2].lower() for spec in TABLES["family"].values()}
    return set(TABLES["family"]) | classes


def method_words() -> set[str]:
    from mmalign.registry import TABLES

    presets = {path.stem for path in (ROOT / "configs" / "presets").glob("*.yaml")}
    # `preference` is also the field of a row that says how sure the annotator was.
    return (set(TABLES["method"]) | set(TABLES["loss"]) | presets) - {"preference"}


def test_no_model_family_is_named_in_trainers_or_losses():
    assert violations(names_none_of(family_words()), "trainers", "mmalign/losses") == []


def test_no_method_is_named_in_policies():
    assert violations(names_none_of(method_words()), "mmalign/policies") == []


# --- safety and randomness --------------------------------------------------------------------------------------------


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def loads_no_code(tree: ast.Module, module: str) -> list[str]:
    """No pickle, no remote code: a checkpoint is data."""
    found = [
        f"{node.lineno}: imports {name}"
        for node, name in imports(tree, module)
        if name.split(".")[0] in {"pickle", "dill", "cloudpickle", "joblib"}
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if "trust_remote_code" in keywords:
            found.append(f"{node.lineno}: trust_remote_code")
        weights_only = keywords.get("weights_only")
        safe = isinstance(weights_only, ast.Constant) and weights_only.value is True
        if dotted(node.func) == "torch.load" and not safe:
            found.append(f"{node.lineno}: torch.load without weights_only=True")
    return found


def draws_nothing_hidden(tree: ast.Module, module: str) -> list[str]:
    """Noise is passed in: torch's and numpy's global generators are used nowhere, and one module seeds."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        draws = {"torch.rand", "torch.randn", "torch.randint", "torch.randperm", "torch.normal", "torch.bernoulli"}
        likes = {"torch.rand_like", "torch.randn_like", "torch.randint_like"}
        if name in likes or (name in draws and not any(k.arg == "generator" for k in node.keywords)):
            found.append(f"{node.lineno}: {name} without a generator")
        if name.startswith("random.") or re.fullmatch(r"(np|numpy)\.random\.(?!default_rng|Generator)\w+", name):
            found.append(f"{node.lineno}: {name} uses a global generator")
        if name.endswith("manual_seed") and module != "mmalign.randomness":
            found.append(f"{node.lineno}: seeds outside mmalign.randomness")
    return found


def test_nothing_loads_pickle_or_remote_code():
    assert violations(loads_no_code, "mmalign", "rewards", "trainers", "assets/build", "bench") == []


def test_all_randomness_is_passed_in():
    assert violations(draws_nothing_hidden, "mmalign", "rewards", "trainers") == []


# --- the rules themselves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "module", "good", "bad"),
    [
        (core_imports_no_edge, "mmalign.run.a", "from ..data import b", "from ..rewards import clip"),
        (core_imports_no_edge, "mmalign.cli", "import mmalign.reward", "def f():\n    from mmalign import trainers"),
        (core_imports_no_edge, "mmalign.__init__", "from .data import x", "from . import rewards"),
        (core_imports_no_edge, "mmalign.data.a", "import rewards_of_others", "import rewards.clip"),
        (core_reaches_edges_by_registry, "mmalign.cli", '"mmalign.reward:x"', 'f("mmalign.trainers.offline")'),
        (
            edges_import_neighbours_relatively,
            "mmalign.rewards.a",
            "from .b import c",
            "from mmalign.rewards.b import c",
        ),
        (edges_import_neighbours_relatively, "mmalign.trainers.a", "from . import b", "from ..rewards import clip"),
        (edges_import_neighbours_relatively, "mmalign.trainers.a", "import mmalign.types", "import trainers"),
        (third_party_is_declared, "mmalign.a", "import torch, json", "import nobody_requires_this"),
        (
            names_none_of({"sdxl"}),
            "mmalign.trainers.a",
            '"""For sdxl."""\nsd = 1',
            'if family == "sdxl_base":\n    pass',
        ),
        (names_none_of({"dpo"}), "mmalign.policies.a", "adpool = 1", "def dpo_score(): ..."),
        (loads_no_code, "mmalign.a", "torch.load(p, weights_only=True)", "torch.load(p)"),
        (loads_no_code, "mmalign.a", "import json", "import pickle"),
        (draws_nothing_hidden, "mmalign.a", "torch.randn(2, generator=g)", "torch.randn(2)"),
        (draws_nothing_hidden, "mmalign.a", "np.random.default_rng(0)", "np.random.seed(0)"),
        (draws_nothing_hidden, "mmalign.a", "x = generator(0, 'n', 'a')", "torch.manual_seed(0)"),
    ],
)
def test_rule_finds_a_planted_violation(rule: Rule, module: str, good: str, bad: str):
    assert rule(ast.parse(good), module) == []
    assert len(rule(ast.parse(bad), module)) >= 1


# --- sizes and packages -----------------------------------------------------------------------------------------------


def test_no_module_is_longer_than_the_budget():
    files = sources("mmalign", "rewards", "trainers", "assets/build", "bench", "tests")
    lengths = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in files}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_assets_fit_their_budget():
    size = sum(p.stat().st_size for p in (ROOT / "assets").rglob("*") if p.is_file() and ".work" not in p.parts)
    assert size <= ASSET_BUDGET_BYTES


def test_every_folder_of_code_is_a_listed_package():
    """setuptools ships only what `packages` lists: a forgotten folder is missing from the wheel alone."""
    on_disk = {path.parent for path in sources("mmalign", "rewards", "trainers")}
    listed = {ROOT / folder for folder in PACKAGE_DIRS.values()}
    assert on_disk <= listed
    assert {str(folder) for folder in listed if not (folder / "__init__.py").is_file()} == set()


@pytest.mark.parametrize("folder", sorted(set(PACKAGE_DIRS.values())))
def test_every_package_says_what_lives_there(folder: str):
    tree = ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or (ROOT / folder / "README.md").is_file()


def test_every_module_has_a_docstring():
    def rule(tree: ast.Module, module: str) -> list[str]:
        return [] if ast.get_docstring(tree) or module == "mmalign.__main__" else ["1: no module docstring"]

    assert violations(rule, "mmalign", "rewards", "trainers", "bench", "assets/build") == []


def test_changelog_has_the_version():
    from mmalign import __version__

    heads = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert heads
    assert __version__ in heads
    assert heads[0] in {__version__, "Unreleased"}
