"""From YAML files, overrides and presets to one tree of values, with the origin of each.

No schema here: `config.py` validates the tree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from mmalign.registry import nearest


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names the key, the value, what is allowed and the fix."""


def find_config(name: str) -> Path:
    """A path as given, or a shipped config by its path below configs/."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = Path(str(files("mmalign.configs")))
    relative = name.removeprefix("configs/")
    for candidate in (shipped / relative, shipped / f"{relative}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(str(p.relative_to(shipped)) for p in shipped.rglob("*.yaml") if p.parent.name != "presets")
    raise ConfigError(f"config {name!r} does not exist{nearest(name, known)}. Shipped: {', '.join(known)}")


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    try:
        tree = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    return tree


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number and refuses duplicate keys."""


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=deep)
        if key in mapping:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


def _construct_float_or_str(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    return float(loader.construct_scalar(node))


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
_StrictLoader.add_constructor("!scientific", _construct_float_or_str)
_StrictLoader.add_implicit_resolver("!scientific", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def read_with_base(path: Path, origin: dict[str, str], seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base:` goes in a circle: {' -> '.join(str(p) for p in (*seen, path))}")
    tree = _read_yaml(path)
    base = tree.pop("base", None)
    merged: dict[str, Any] = {}
    if base is not None:
        base_path = path.parent / str(base)
        if not base_path.is_file():
            base_path = find_config(str(base))
        merged = read_with_base(base_path, origin, (*seen, path.resolve()))
    _drop_replaced(merged, tree, origin)
    _merge(merged, tree, origin, str(path))
    return merged


def _drop_replaced(merged: dict[str, Any], tree: Mapping[str, Any], origin: dict[str, str]) -> None:
    """Another preset or name starts the method section anew: the base's losses belong to the base's method. So does
    another data format the options: they are those of the base's reader."""
    method, data, old = tree.get("method"), tree.get("data"), merged.get("data")
    if isinstance(method, Mapping) and ("preset" in method or "name" in method):
        merged.pop("method", None)
        _forget_origin(origin, "method")
    if not (isinstance(data, Mapping) and isinstance(old, dict) and "format" in data):
        return
    if "auto" not in (before := old.get("format", "auto"), data["format"]) and before != data["format"]:
        old.pop("options", None)
        _forget_origin(origin, "data.options")


def _merge(into: dict[str, Any], tree: Mapping[str, Any], origin: dict[str, str], label: str, prefix: str = "") -> None:
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value, origin, label, name)
        else:
            into[key] = plain(value)
            _set_origin(origin, name, value, label)


def _forget_origin(origin: dict[str, str], name: str) -> None:
    for known in [key for key in origin if key == name or key.startswith(f"{name}.")]:
        del origin[known]


def _set_origin(origin: dict[str, str], name: str, value: Any, label: str) -> None:
    _forget_origin(origin, name)
    for key, _ in flatten(value, name):
        origin[key] = label


def parse_value(pair: str) -> tuple[str, Any]:
    """`key=value` with the value read as YAML. Raises `ConfigError`."""
    key, separator, text = pair.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {pair!r} is not of the form key=value, e.g. train.steps=100")
    try:
        return key, yaml.load(text, Loader=_StrictLoader) if text else None
    except yaml.YAMLError:
        raise ConfigError(f"override {pair!r}: {text!r} is not valid YAML") from None


def starts_anew(override: str) -> bool:
    """Whether the override drops what its section holds: see `_drop_replaced`."""
    return override.partition("=")[0] in ("method.preset", "method.name", "data.format")


def apply_override(tree: dict[str, Any], override: str, origin: dict[str, str]) -> None:
    key, value = parse_value(override)
    *parents, last = key.split(".")
    if len(parents) == 1:
        _drop_replaced(tree, {parents[0]: {last: value}}, origin)
    node = tree
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent!r} holds {child!r}, not a section")
        node = child
    node[last] = value
    _set_origin(origin, key, value, f"override {override}")


def apply_preset(tree: dict[str, Any], origin: dict[str, str]) -> None:
    method = tree.get("method")
    if not isinstance(method, dict) or not method.get("preset"):
        return
    folder = Path(str(files("mmalign.configs"))) / "presets"
    path = folder / f"{method['preset']}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        raise ConfigError(
            f"method.preset {method['preset']!r} does not exist{nearest(method['preset'], known)}. "
            f"Presets: {', '.join(known)}"
        )
    for key, value in _read_yaml(path).items():
        if key not in method:
            method[key] = value
            _set_origin(origin, f"method.{key}", value, f"preset {method['preset']}")
