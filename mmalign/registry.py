"""Names, dotted paths and files: one way to find a policy family, method, loss, reward or reader.

Wherever a config takes a name it also takes `package.module:Name` and `path/to/file.py:Name`. The tables hold strings,
so that `import mmalign` loads no reward, no trainer and no model code.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

TABLES: dict[str, dict[str, str]] = {
    "family": {
        "llava": "mmalign.policies.families.llava:Llava",
        "sd15": "mmalign.policies.families.sd:StableDiffusion",
        "sd3": "mmalign.policies.families.sd3:StableDiffusion3",
        "sdxl": "mmalign.policies.families.sdxl:StableDiffusionXL",
    },
    "loop": {
        "offline": "mmalign.trainers.offline:train",
        "online": "mmalign.trainers.online:train",
    },
    "method": {
        "grpo": "mmalign.trainers.grpo:GroupPolicyGradient",
        "preference": "mmalign.trainers.preference:Preference",
    },
    "loss": {
        "anchor": "mmalign.losses.preference:anchor",
        "copo": "mmalign.losses.preference:copo",
        "dpo": "mmalign.losses.preference:dpo",
        "mapo": "mmalign.losses.preference:mapo",
        "mapo_paper": "mmalign.losses.preference:mapo_paper",
        "nll": "mmalign.losses.preference:nll",
        "sft": "mmalign.losses.preference:sft",
    },
    "reward": {
        "aesthetic": "mmalign.rewards.aesthetic:Aesthetic",
        "clip": "mmalign.rewards.clip:Clip",
        "synthetic_answers": "mmalign.rewards.synthetic_answers:SyntheticAnswers",
        "synthetic_truth": "mmalign.rewards.synthetic_truth:SyntheticTruth",
    },
    "reader": {
        "folders": "mmalign.data.readers:read_folders",
        "hub": "mmalign.data.readers:read_hub",
        "jsonl": "mmalign.data.readers:read_jsonl",
        "mdpo": "mmalign.data.readers:read_mdpo",
        "parquet": "mmalign.data.readers:read_parquet",
        "pickapic": "mmalign.data.readers:read_pickapic",
        "prompts": "mmalign.data.readers:read_prompts",
        "rlhf_v": "mmalign.data.readers:read_rlhf_v",
        "synthetic": "mmalign.data.synthetic:read_synthetic",
        "synthetic_answers": "mmalign.data.synthetic:read_synthetic_answers",
        "trl": "mmalign.data.readers:read_trl",
    },
}


def names(kind: str) -> list[str]:
    return sorted(TABLES[kind])


def resolve(kind: str, spec: str) -> Any:
    """The object behind a name, `package.module:Name` or `path/to/file.py:Name`.

    Raises `ValueError` naming the spec, what is allowed and the nearest valid name.
    """
    if ":" in spec:
        return _import(kind, spec)
    table = TABLES[kind]
    if spec not in table:
        raise ValueError(
            f"unknown {kind} {spec!r}{nearest(spec, table)}. Built in: {', '.join(sorted(table))}; "
            f"or give your own as package.module:Name or path/to/file.py:Name"
        )
    return _import(kind, table[spec])


def nearest(word: str, known: Any) -> str:
    """` (did you mean 'x'?)`, or nothing."""
    match = difflib.get_close_matches(str(word), [str(name) for name in known], n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _import(kind: str, spec: str) -> Any:
    module_name, _, attribute = spec.rpartition(":")
    if module_name.endswith(".py"):
        module = _load_file(kind, Path(module_name).expanduser())
    else:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ValueError(f"{kind} {spec!r}: cannot import {module_name!r}: {error}") from error
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise ValueError(f"{kind} {spec!r}: {module_name} has no {attribute!r}{nearest(attribute, public)}")
    return getattr(module, attribute)


def file_digests(tree: Any) -> dict[str, str]:
    """Digest of each file behind a `path/to/file.py:Name` anywhere in `tree` (mappings, lists, strings), by its path."""
    if isinstance(tree, str):
        file = tree.rpartition(":")[0]
        path = Path(file).expanduser()
        if not file.endswith(".py") or not path.is_file():
            return {}
        return {file: hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()}
    parts = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (list, tuple)) else ()
    return {file: digest for part in parts for file, digest in file_digests(part).items()}


def _load_file(kind: str, path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{kind} file {str(path)!r} does not exist (relative paths start at {Path.cwd()})")
    path = path.resolve()
    # The content is part of the name: an edited file is loaded anew, also within one notebook.
    identity = str(path).encode() + path.read_bytes()
    name = f"mmalign_user_{path.stem}_{hashlib.blake2b(identity, digest_size=6).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception):
            line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
            raise ValueError(
                f"{kind} file {str(path)!r}{line} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
        raise
    return module


def options_model(function: Callable[..., Any]) -> type[BaseModel]:
    """A strict pydantic model of a plug-in's keyword-only parameters: they are its config schema."""
    target = function.__init__ if inspect.isclass(function) else function  # type: ignore[misc]
    fields: dict[str, Any] = {}
    hints = inspect.get_annotations(target, eval_str=False)
    namespace = getattr(target, "__globals__", {})
    for parameter in inspect.signature(target).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint = hints.get(parameter.name, Any)
        if isinstance(hint, str):
            try:
                hint = eval(hint, dict(namespace))
            except NameError:
                hint = Any
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[parameter.name] = (hint, default)
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    return create_model(getattr(function, "__name__", "Options"), __config__=config, **fields)


def check_options(
    kind: str, spec: str, function: Callable[..., Any], options: dict[str, Any], *, beside: tuple[str, ...] = ()
) -> dict[str, Any]:
    """`options` validated against the keyword-only parameters of `function`, defaults filled in.

    `beside` are the section's own keys, which a typo may have meant.

    Raises `ValueError` naming the option, what is allowed and the nearest valid name.
    """
    model = options_model(function)
    for name in options:
        if name not in model.model_fields:
            allowed = ", ".join(sorted(model.model_fields)) or "none"
            known = [*beside, *model.model_fields]
            raise ValueError(f"{kind} {spec!r} has no option {name!r}{nearest(name, known)}. Options: {allowed}")
    try:
        filled = model(**options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{kind} {spec!r}: option {where!r}: {first['msg']} (got {first.get('input')!r})") from error
    return {name: getattr(filled, name) for name in model.model_fields}
