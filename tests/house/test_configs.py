"""Every shipped YAML parses and keeps its meaning on disk; every key is documented and read."""

from __future__ import annotations

import ast
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from mmalign import config as schema
from mmalign.builtin import builtin_path
from mmalign.config import Config, ConfigError, load_config
from mmalign.data.questions import SCENES

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
RECIPES = sorted(str(p.relative_to(ROOT)) for p in CONFIGS.rglob("*.yaml") if p.parent.name != "presets")
PRESETS = sorted(p.stem for p in (CONFIGS / "presets").glob("*.yaml"))


def test_there_are_recipes_and_presets():
    assert RECIPES
    assert PRESETS


@pytest.mark.parametrize("path", RECIPES)
def test_recipe_parses(path: str):
    loaded = load_config(ROOT / path)
    assert loaded.config.output_dir
    assert load_config(path.removeprefix("configs/")).config == loaded.config


@pytest.mark.parametrize("path", RECIPES)
def test_bundled_files_of_a_recipe_exist(path: str):
    config = load_config(ROOT / path).config
    for spec in (config.model.path, config.model.vae, config.evaluate.prompts):
        if spec is not None and spec.startswith("builtin:") and spec not in SCENES:  # scenes are drawn, not read
            assert builtin_path(spec).exists()


@pytest.mark.parametrize("path", RECIPES)
def test_recipe_round_trips_through_its_resolved_form(path: str, tmp_path: Path):
    """`config.yaml` of a run is the same run: nothing is lost or reinterpreted on the way to disk and back."""
    loaded = load_config(ROOT / path)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(schema.to_yaml(loaded.config), encoding="utf-8")
    assert load_config(resolved).config == loaded.config


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_gives_a_method_whose_options_are_valid(preset: str):
    loaded = load_config(minimal_for(preset))
    assert loaded.config.method.name
    assert loaded.origin_of("method.name") == f"preset {preset}"


@pytest.mark.parametrize("name", [*RECIPES, *(f"configs/presets/{preset}.yaml" for preset in PRESETS)])
def test_misspelt_key_is_an_error_that_names_the_right_one(name: str):
    """One key of each section, one letter dropped: strictness holds for what is shipped, not for a toy example."""
    tree = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    if name.startswith("configs/presets/"):
        tree = {"method": tree}
        base = {**minimal_for(Path(name).stem), "method": tree["method"]}
    else:
        base = yaml.safe_load(schema.to_yaml(load_config(ROOT / name).config))
    for section, keys in tree.items():
        if not isinstance(keys, dict) or section not in Config.model_fields:
            continue
        key = max(keys, key=len)
        broken = {**base, section: {**base[section], key[:-2] + key[-1]: 1}}
        with pytest.raises(ConfigError, match=re.escape(key)):
            load_config(broken)


# The model a preset is for, where it is not a diffusion model.
FAMILY = {
    "dpo": "llava",
    "mdpo": "llava",
    "nll": "llava",
    "dance_grpo": "sd3",
    "flow_grpo": "sd3",
    "flow_grpo_fast": "sd3",
}


def minimal_for(preset: str) -> dict[str, object]:
    made = minimal(method={"preset": preset})
    made["model"] = {"family": FAMILY.get(preset, "sdxl"), "path": "some/model"}
    return {**made, "rewards": ["clip"]} if "grpo" in preset else made


def minimal(**sections: object) -> dict[str, object]:
    return {
        "model": {"family": "sdxl", "path": "some/model"},
        "method": {"preset": "diffusion_dpo"},
        "data": {"path": "some/data"},
        "train": {"steps": 1, "batch_size": 1, "learning_rate": 1e-5},
        "output_dir": "runs/x",
        **sections,
    }


# --- every key is documented and read ---------------------------------------------------------------------------------


def sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """(key it is held under, class) of every section below the root."""
    yield from _sections_of(Config)


def _sections_of(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    for key, field in model.model_fields.items():
        for child in _models_in(field.annotation):
            yield key, child
            yield from _sections_of(child)


def _models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]


FIELDS = sorted({(model.__name__, field) for _, model in sections() for field in model.model_fields})
HOLDERS: dict[str, set[str]] = {}
for _key, _model in sections():
    HOLDERS.setdefault(_model.__name__, set()).add(_key)


def test_every_key_is_documented():
    """A key that holds a section is documented by the keys of that section."""
    undocumented = []
    for section, field in FIELDS:
        info = getattr(schema, section).model_fields[field]
        if not _models_in(info.annotation) and len(info.description or "") < 10:
            undocumented.append(f"{section}.{field}")
    assert undocumented == []


class Reads(ast.NodeVisitor):
    """Which (section class, field) pairs a file reads as `holder.field`.

    A holder is an expression that ends in the section's key (`config.train`, `self.config.data`), a name annotated with
    the section's class, a name or attribute assigned from a holder, or a loop variable over one.
    """

    def __init__(self) -> None:
        self.found: set[tuple[str, str]] = set()
        self.names: dict[str, set[str]] = {}

    def classes_of(self, node: ast.expr) -> set[str]:
        if isinstance(node, ast.Name) and node.id in self.names:
            return self.names[node.id]
        if isinstance(node, ast.Subscript):
            return self.classes_of(node.value)
        if isinstance(node, (ast.BoolOp, ast.IfExp)):
            parts = node.values if isinstance(node, ast.BoolOp) else [node.body, node.orelse]
            return set().union(*map(self.classes_of, parts))
        if isinstance(node, ast.BinOp):
            return self.classes_of(node.left) | self.classes_of(node.right)
        if isinstance(node, (ast.List, ast.Tuple)):
            return set().union(*(self.classes_of(part) for part in node.elts)) if node.elts else set()
        if isinstance(node, ast.Starred):
            return self.classes_of(node.value)
        if isinstance(node, ast.Call) and node.args:  # enumerate(config.rewards), list(…)
            return self.classes_of(node.args[0])
        if isinstance(node, ast.Attribute) and f".{node.attr}" in self.names:
            return self.names[f".{node.attr}"]
        word = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        return {name for name, keys in HOLDERS.items() if word in keys or word.lstrip("_") in keys}

    def bind(self, target: ast.expr, classes: set[str]) -> None:
        if isinstance(target, (ast.Name, ast.Attribute)) and classes:
            name = target.id if isinstance(target, ast.Name) else f".{target.attr}"
            self.names[name] = self.names.get(name, set()) | classes
        elif isinstance(target, ast.Tuple):
            for part in target.elts:
                self.bind(part, classes)

    def visit_arg(self, node: ast.arg) -> None:
        if node.annotation is not None:
            text = ast.unparse(node.annotation)
            self.bind(ast.Name(node.arg), {name for name in HOLDERS if re.search(rf"\b{name}\b", text)})

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        text = ast.unparse(node.annotation)
        self.bind(node.target, {name for name in HOLDERS if re.search(rf"\b{name}\b", text)})
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self.bind(target, self.classes_of(node.value))
        self.generic_visit(node)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.bind(node.target, self.classes_of(node.value))
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self.bind(node.target, self.classes_of(node.iter))
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.bind(node.target, self.classes_of(node.iter))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.found |= {(name, node.attr) for name in self.classes_of(node.value)}
        self.generic_visit(node)


def reads(source: str) -> set[tuple[str, str]]:
    visitor = Reads()
    tree = ast.parse(source)
    visitor.visit(tree)  # names first: a comprehension's element stands before its loop
    visitor.visit(tree)
    return visitor.found


# `method.preset` is consumed while the config is read (config.py), before there is a MethodConfig to ask.
READ_BY_THE_SCHEMA = {("MethodConfig", "preset")}


def test_every_key_is_read():
    found: set[tuple[str, str]] = set()
    for folder in ("mmalign", "trainers", "rewards"):
        for path in (ROOT / folder).rglob("*.py"):
            if path != ROOT / "mmalign" / "config.py":
                found |= reads(path.read_text(encoding="utf-8"))
    unread = [f"{section}.{field}" for section, field in FIELDS if (section, field) not in found | READ_BY_THE_SCHEMA]
    assert unread == [], "options that do nothing"


def test_key_scan_tells_read_from_unread():
    source = """
def build(settings: TrainConfig, other):
    lora = other.model.lora
    print(settings.steps, lora.rank, [scorer.weight for scorer in other.config.rewards], self.alpha)
class Policy:
    def __init__(self, config: ModelConfig):
        self.config = config
    def load(self):
        return self.config.revision
"""
    found = reads(source)
    assert {
        ("TrainConfig", "steps"),
        ("LoraConfig", "rank"),
        ("RewardConfig", "weight"),
        ("ModelConfig", "revision"),
    } <= found
    assert ("LoraConfig", "alpha") not in found
    assert ("TrainConfig", "rank") not in found
