"""The run configuration: strict schema, YAML with `base:` inheritance, `key=value` overrides, provenance of each value.

Every key is declared here with its unit and source. An unknown key is an error that names the nearest valid one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mmalign.registry import nearest


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names the key, the value, what is allowed and the fix."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True, frozen=True)


class LoraConfig(Section):
    rank: int = Field(8, ge=1)
    """Rank r of the update BA."""
    alpha: int | None = Field(None, ge=1)
    """Scale of the update, alpha/r. Default: equal to the rank, i.e. scale 1 (as published DPO and MaPO scripts)."""
    targets: Literal["attention", "all"] | list[str] = "attention"
    """`attention`: q, k, v and output projections (published); `all`: every linear and conv layer except the input
    and output convolution; or a list of module-name suffixes."""


class ModelConfig(Section):
    family: str
    """Policy family: a registered name (`mmalign doctor` lists them), package.module:Name or file.py:Name."""
    path: str
    """Hub id, local folder in diffusers/transformers format, or `builtin:NAME` for a bundled tiny model."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    variant: str | None = None
    """Weight file variant, e.g. `fp16`."""
    vae: str | None = None
    """Another VAE (hub id or folder). SDXL in fp16 wants `madebyollin/sdxl-vae-fp16-fix`; without it the VAE runs in fp32."""
    lora: LoraConfig | None = None
    """Train a low-rank adapter (the reference is the same network with the adapter off). Absent: full fine-tuning."""
    adapters: list[str] = []
    """LoRA folders or files to stack frozen below the trained weights; part of the reference too."""
    attention: Literal["auto", "sdpa", "xformers", "flash"] = "auto"
    """Attention kernel. `auto`: xformers on a GPU where it really works, otherwise SDPA. An explicit choice that cannot
    run here is an error. What was really used is logged."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Compute precision. Trained weights, latents, errors and losses stay fp32; policy and reference share the autocast."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about one more forward."""


class MethodConfig(BaseModel):
    """`preset` names a file in configs/presets that pins published settings; keys given beside it override the preset."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True, frozen=True)
    preset: str | None = None
    """Published settings by name: diffusion_dpo, mapo …"""
    name: str = ""
    """Method: a registered name, package.module:Name or file.py:Name. Its keyword-only parameters are its options."""

    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class DataConfig(Section):
    path: str
    """Hub id, file or folder; `builtin:…` for the synthetic world."""
    format: str = "auto"
    """Row format: auto, a registered reader, package.module:Name or file.py:Name."""
    options: dict[str, Any] = {}
    """Options of the reader (its keyword-only parameters)."""
    on_bad_row: Literal["error", "skip"] = "error"
    """`skip` drops a bad row, counts it and writes it to bad_rows.jsonl."""
    limit: int | None = Field(None, ge=1)
    """Use only the first N rows."""
    swap: bool = False
    """Exchange chosen and rejected in every row: the sign test. A working method must then get worse."""
    label_noise: float = Field(0.0, ge=0, le=1)
    """Share of rows whose preference is flipped, drawn by row id. 0.5 is the shuffled-label control."""
    resolution: int | None = Field(None, ge=8)
    """Training size in pixels (square). Default: the size the model was trained at."""
    crop: Literal["center", "random"] = "center"
    """Crop after the short side is resized to `resolution`. The same relative crop serves both images of a pair."""
    num_crops: int = Field(1, ge=1)
    """With `crop: random`: number of distinct crops per row, cycled through (each is cached once)."""
    flip: bool = False
    """Random horizontal flip, the same for both images of a pair."""
    size_ids: Literal["true", "target"] = "true"
    """SDXL original-size conditioning: `true` passes each image's real size (diffusers, MaPO), `target` the training
    resolution (Salesforce DiffusionDPO)."""
    prompt_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of the empty prompt, drawn once per pair (Salesforce DiffusionDPO uses 0.2)."""
    cache: bool = True
    """Encode each unique image and prompt once and keep the result on disk."""
    cache_dir: str | None = None
    """Where the cache lies. Default: $MMALIGN_CACHE or ~/.cache/mmalign."""
    cache_reference: int = Field(0, ge=0)
    """K > 0: precompute the reference's scores for K draws per row and cycle through them (no reference forward in the
    loop). 0: score the reference in every step with fresh draws."""
    num_workers: int = Field(0, ge=0)
    """Threads that prepare batches ahead. 0 is right with `cache: true`."""


class EmaConfig(Section):
    decay: float = Field(0.9999, gt=0, lt=1)
    """Decay per optimizer step, warmed up as min(decay, (1+n)/(10+n))."""


class StopConfig(Section):
    metric: str = "chosen_error_delta"
    """A logged metric. `chosen_error_delta` is the winner's error minus the reference's: positive means the policy got
    worse at what people prefer, the usual silent failure of DPO."""
    above: float
    """Stop when the moving average of the metric exceeds this."""
    smoothing: float = Field(0.9, ge=0, lt=1)
    """Weight of the past in the moving average, per logged line (`run.log_every` steps)."""


class TrainConfig(Section):
    steps: int = Field(ge=0)
    """Optimizer steps."""
    batch_size: int = Field(ge=1)
    """Rows (pairs) per forward and process. One step uses batch_size · accumulate · processes rows."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches per optimizer step."""
    num_draws: int = Field(1, ge=1)
    """Draws K of (t, noise) averaged inside the score, before the loss. Less variance, K times the compute."""
    score_chunk: int | None = Field(None, ge=1)
    """Score-then-backward: back-propagate at most this many requests at a time. Same gradients, memory of one chunk, one
    more forward. None: one joint forward."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape after warm-up; cosine and linear end at 0 at `steps`."""
    warmup_steps: int = Field(0, ge=0)
    """Linear warm-up in optimizer steps."""
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    """adamw_8bit needs bitsandbytes (extra `quant`); adafactor has no momentum and factored second moments."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW moments."""
    epsilon: float = Field(1e-8, gt=0)
    """AdamW denominator constant."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Clip the global gradient norm. None: no clipping (the norm is still logged)."""
    ema: EmaConfig | None = None
    """Keep an exponential moving average; it is what is evaluated and exported."""
    stop: StopConfig | None = None
    """Stop early on a logged metric."""
    seed: int = 0
    """Seed of all randomness."""


class RewardConfig(BaseModel):
    """`name`; every other key is an option of the reward. A bare string is a name without options."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True, frozen=True)
    name: str
    """A registered reward, package.module:Name or path/to/file.py:Name."""

    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class EvaluateConfig(Section):
    prompts: str | None = None
    """A text file (one prompt a line), JSONL/TSV with a prompt column, or `builtin:SPLIT`. None: no evaluation."""
    limit: int | None = Field(None, ge=1)
    """Use only the first N prompts."""
    seeds: int = Field(4, ge=1)
    """Images per prompt; base and tuned model start from the same noise."""
    every: int | None = Field(None, ge=1)
    """Also draw a preview grid every N steps (first prompts, one seed)."""
    preview_prompts: int = Field(4, ge=1)
    """Rows of a preview grid."""
    rewards: list[RewardConfig] = []
    """Rewards to report."""
    held_out: list[RewardConfig] = []
    """Rewards to report that training never saw; they expose reward hacking."""
    guidance_scale: list[float] = []
    """Classifier-free guidance scales to evaluate at. Empty: the family's default."""
    num_steps: int | None = Field(None, ge=1)
    """Denoising steps. None: the family's default."""
    batch_size: int = Field(8, ge=1)
    """Images per sampling forward."""
    grid_prompts: int = Field(8, ge=1)
    """Prompts shown in grid.png (the report holds all)."""

    @field_validator("guidance_scale", mode="before")
    @classmethod
    def _one_scale(cls, value: Any) -> Any:
        return [value] if isinstance(value, (int, float)) else value


class CheckpointConfig(Section):
    every: int | None = Field(None, ge=1)
    """Steps between checkpoints. None: only on interruption and at the end."""
    keep: int = Field(2, ge=1)
    """Newest complete checkpoints kept."""


class RunConfig(Section):
    resume: Literal["auto", "never"] = "auto"
    """`auto` continues from the newest complete checkpoint in output_dir; `never` refuses a used folder."""
    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    """Where scalars and previews go, beside metrics.jsonl."""
    log_every: int = Field(10, ge=1)
    """Steps between logged lines (the loop never waits for the device in between)."""
    preflight: bool = True
    """Check golden numbers and that gradients reach every trained group before the first step."""


class Config(Section):
    model: ModelConfig
    method: MethodConfig
    data: DataConfig
    rewards: list[RewardConfig] = []
    """Training rewards (online methods)."""
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    run: RunConfig = RunConfig()
    output_dir: str
    """Run folder."""

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Config:
        """An option that would do nothing is a mistake, not a default."""
        data, train = self.data, self.train
        idle = {
            "evaluate.every": self.evaluate.every is not None and self.evaluate.prompts is None,
            "data.num_crops": data.num_crops > 1 and data.crop == "center",
            "data.cache_dir": data.cache_dir is not None and not data.cache,
            "train.betas": train.optimizer == "adafactor" and train.betas != TrainConfig.model_fields["betas"].default,
        }
        reasons = {
            "evaluate.every": "previews need evaluate.prompts",
            "data.num_crops": "crop: center has one crop; set data.crop=random",
            "data.cache_dir": "data.cache is false",
            "train.betas": "adafactor has no Adam moments",
        }
        for key, without_effect in idle.items():
            if without_effect:
                raise ValueError(f"{key} would do nothing: {reasons[key]}")
        return self


@dataclass(frozen=True)
class LoadedConfig:
    """A validated config and where each resolved value came from (`default`, `preset NAME`, a file, `override`)."""

    config: Config
    origin: Mapping[str, str]
    source: str

    def values(self) -> Iterator[tuple[str, Any, str]]:
        for key, value in flatten(dump(self.config)):
            yield key, value, self.origin_of(key)

    def origin_of(self, key: str) -> str:
        parts = key.split(".")
        for end in range(len(parts), 0, -1):
            prefix = ".".join(parts[:end])
            if prefix in self.origin:
                return self.origin[prefix]
        return "default"


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read, merge, override and validate.

    Args:
        source: YAML file, `package:sdxl/diffusion_dpo_lora.yaml`-style name of a shipped config, or a mapping.
        overrides: `section.key=value` strings; the value is parsed as YAML.

    Raises `ConfigError`.
    """
    origin: dict[str, str] = {}
    if isinstance(source, Mapping):
        tree, label = _plain(source), "config"
        for key, _ in flatten(tree):
            origin[key] = "python"
    else:
        path = find_config(str(source))
        tree, label = _read_with_base(path, origin, seen=()), str(source)
    for override in overrides:
        _apply_override(tree, override, origin)
    _apply_preset(tree, origin)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, label)) from None
    _check_plugins(config)
    return LoadedConfig(config, origin, label)


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


def dump(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(dump(config), sort_keys=False, allow_unicode=True)


def json_schema() -> str:
    """JSON Schema of the config, for editors."""
    return json.dumps(Config.model_json_schema(), indent=2)


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
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


def _read_with_base(path: Path, origin: dict[str, str], seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base:` goes in a circle: {' -> '.join(str(p) for p in (*seen, path))}")
    tree = _read_yaml(path)
    base = tree.pop("base", None)
    merged: dict[str, Any] = {}
    if base is not None:
        base_path = path.parent / str(base)
        if not base_path.is_file():
            base_path = find_config(str(base))
        merged = _read_with_base(base_path, origin, (*seen, path.resolve()))
    _drop_replaced_method(merged, tree.get("method"), origin)
    _merge(merged, tree, origin, str(path))
    return merged


def _drop_replaced_method(merged: dict[str, Any], method: Any, origin: dict[str, str]) -> None:
    """Another preset or name starts the method section anew: the base's losses belong to the base's method."""
    if isinstance(method, Mapping) and ("preset" in method or "name" in method) and "method" in merged:
        del merged["method"]
        for key in [key for key in origin if key.startswith("method.")]:
            del origin[key]


def _merge(into: dict[str, Any], tree: Mapping[str, Any], origin: dict[str, str], label: str, prefix: str = "") -> None:
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value, origin, label, name)
        else:
            into[key] = _plain(value)
            _set_origin(origin, name, value, label)


def _set_origin(origin: dict[str, str], name: str, value: Any, label: str) -> None:
    for known in [key for key in origin if key == name or key.startswith(f"{name}.")]:
        del origin[known]
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


def _apply_override(tree: dict[str, Any], override: str, origin: dict[str, str]) -> None:
    key, value = parse_value(override)
    if key in ("method.preset", "method.name"):
        _drop_replaced_method(tree, {"preset": value}, origin)
    node = tree
    *parents, last = key.split(".")
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent!r} holds {child!r}, not a section")
        node = child
    node[last] = value
    _set_origin(origin, key, value, f"override {override}")


def _apply_preset(tree: dict[str, Any], origin: dict[str, str]) -> None:
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


def _check_plugins(config: Config) -> None:
    """Names resolve and options are known before anything is loaded."""
    from mmalign import registry

    if not config.method.name:
        raise ConfigError(f"method: give a `preset` or a `name`. Methods: {', '.join(registry.names('method'))}")
    sections = [config.rewards, config.evaluate.rewards, config.evaluate.held_out]
    try:
        registry.resolve("family", config.model.family)
        method = registry.resolve("method", config.method.name)
        options = config.method.options()
        registry.check_options("method", config.method.name, method, options, beside=("preset", "name"))
        method(**options)  # a method is its settings alone; losses inside are checked here
        for reward in (reward for section in sections for reward in section):
            found = registry.resolve("reward", reward.name)
            registry.check_options("reward", reward.name, found, reward.options(), beside=("name",))
        if config.data.format != "auto":
            reader = registry.resolve("reader", config.data.format)
            registry.check_options("reader", config.data.format, reader, dict(config.data.options))
    except ValueError as error:
        raise ConfigError(" ".join(str(error).splitlines())) from error  # a plug-in's own error may have several


def _explain(error: ValidationError, label: str) -> str:
    """One line for each problem: key, value, what is allowed, nearest name."""
    lines = []
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        key = ".".join(location)
        if problem["type"] == "extra_forbidden":
            section = _section_at(location[:-1])
            known = sorted(section.model_fields) if section else []
            lines.append(f"unknown key {key!r}{nearest(location[-1], known)}. Keys here: {', '.join(known)}")
        elif problem["type"] == "missing":
            lines.append(f"missing key {key!r}")
        else:
            lines.append(f"{key} = {problem['input']!r}: {problem['msg']}")
    return f"{label}: " + "; ".join(lines)


def _section_at(location: Sequence[str]) -> type[BaseModel] | None:
    section: Any = Config
    for part in location:
        if part.isdigit() or part not in getattr(section, "model_fields", {}):
            continue
        annotation = section.model_fields[part].annotation
        options = getattr(annotation, "__args__", (annotation,))
        section = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if section is None:
            return None
    return section
