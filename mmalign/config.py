"""The run configuration: strict schema, YAML with `base:` inheritance, `key=value` overrides, provenance of each value.

Every key is declared here with its unit and source. An unknown key is an error that names the nearest valid one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mmalign.config_files import (
    ConfigError,
    apply_override,
    apply_preset,
    find_config,
    flatten,
    parse_value,
    plain,
    read_with_base,
    starts_anew,
)
from mmalign.registry import nearest

__all__ = ["Config", "ConfigError", "LoadedConfig", "find_config", "flatten", "load_config", "parse_value"]


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
    without: list[str] = []
    """Components of the pipeline not to load. SD3 runs without its largest text encoder: [text_encoder_3, tokenizer_3]."""
    max_sequence_length: int | None = Field(None, ge=1)
    """T5 tokens of the SD3 family. Default: what the pipeline uses (256)."""
    timestep_density: Literal["family", "uniform", "logit_normal"] = "family"
    """Flow models: training density of σ before the shift. `family`: as pre-trained (SD3: logit-normal(0, 1))."""
    timestep_shift: float | None = Field(None, gt=0)
    """Flow models: shift of the training density. Default: the scheduler's, static or by resolution."""
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


class NegativeConfig(Section):
    kind: Literal["crop", "other", "black", "noise"] = "crop"
    """How the image a response is wrong about is made: `crop` enlarges a small part of the image (mDPO), `other` takes
    another row's image, `black` and `noise` leave nothing to see. A row's own `rejected_images` are used as they are."""
    area: tuple[float, float] = (0.01, 0.2)
    """`crop`: range of the kept share of the image's area (mDPO's released code: 0.01 to 0.2)."""
    variants: int = Field(1, ge=1)
    """Different negatives per row, cycled through its visits (each is encoded once)."""

    @field_validator("area")
    @classmethod
    def _shares(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError("must be (low, high) with 0 < low <= high <= 1")
        return value


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
    max_length: int | None = Field(None, ge=8)
    """Language models: longest row in tokens, image tokens included. Default: what the model was built for."""
    truncation: Literal["error", "response"] = "error"
    """Language models: `error` makes an over-long row a bad row; `response` cuts the end of its response, then its oldest
    turns, and counts it. Image tokens are never cut."""
    image_negative: NegativeConfig | None = None
    """Language models: how the rejected image of a row is made, for methods that contrast images (mDPO). Default there:
    mDPO's crop."""
    blind: bool = False
    """Language models: show a black image in place of every image. The control: a method that learns as much without
    looking has learned nothing about images."""
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


LOOP_METRICS = ("loss", "grad_norm")
"""What is logged whatever the method; the rest are the metrics of its loss."""


class StopConfig(Section):
    metric: str = "chosen_error_delta"
    """A logged metric. `chosen_error_delta` is the winner's error minus the reference's: positive means the policy got
    worse at what people prefer, the usual silent failure of DPO."""
    above: float | None = None
    """Stop when the moving average of the metric exceeds this."""
    below: float | None = None
    """Stop when it falls below this. Exactly one of the two is given."""
    smoothing: float = Field(0.9, ge=0, lt=1)
    """Weight of the past in the moving average, per logged line (`run.log_every` steps)."""

    @model_validator(mode="after")
    def _one_bound(self) -> StopConfig:
        if (self.above is None) == (self.below is None):
            raise ValueError(
                f"must have exactly one of above and below, got above = {self.above} and below = {self.below}; set the "
                f"other to null"
            )
        return self

    def check_metric(self, logged: Iterable[str]) -> None:
        """Raise `ConfigError` if the metric is not among those logged."""
        names = sorted(logged)
        if self.metric not in names:
            raise ConfigError(
                f"train.stop.metric = {self.metric!r} is not logged by this method{nearest(self.metric, names)}. "
                f"Logged: {', '.join(names)}"
            )


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
    weight: float = 1.0
    """Training rewards: weight in the sum (of advantages or of raw rewards, as the method combines them)."""
    timeout: float | None = Field(None, gt=0)
    """Training rewards: seconds until a batch counts as failed. Its samples are then left out of the update."""

    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


NEUTRAL_REWARD_OPTIONS = ("batch_size", "device")
"""Options of a reward that change speed or place, not the score."""


def reward_identity(reward: RewardConfig) -> str:
    """Name and options that change the score: two CLIP models are two rewards, one CLIP with two weights is one."""
    options = {key: value for key, value in reward.options().items() if key not in NEUTRAL_REWARD_OPTIONS}
    return json.dumps([reward.name, options], sort_keys=True, default=str)


class EvaluateConfig(Section):
    prompts: str | None = None
    """A text file (one prompt a line), JSONL/TSV with a prompt column, or `builtin:SPLIT`. Language models: JSONL or
    Parquet with questions, images and what rewards need to know. None: no evaluation."""
    limit: int | None = Field(None, ge=1)
    """Use only the first N prompts."""
    seeds: int = Field(4, ge=1)
    """Images or answers per prompt; base and tuned model draw from the same noise."""
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
    """Images or answers per sampling forward."""
    temperature: float = Field(1.0, ge=0)
    """Language models: sampling temperature; 0 is greedy."""
    max_new_tokens: int = Field(64, ge=1)
    """Language models: longest answer in tokens."""
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
            "data.num_crops": data.num_crops > 1
            and (data.crop == "center" or 0 < data.cache_reference < data.num_crops * train.num_draws),
            "data.cache_dir": data.cache_dir is not None and not data.cache,
            "data.image_negative.variants": data.image_negative is not None
            and 0 < data.cache_reference < data.image_negative.variants,
            "train.betas": train.optimizer == "adafactor" and train.betas != TrainConfig.model_fields["betas"].default,
        }
        weighted = [r.name for r in (*self.evaluate.rewards, *self.evaluate.held_out) if r.weight != 1 or r.timeout]
        if weighted:
            raise ValueError(
                f"reward {weighted[0]!r}: weight and timeout belong to training rewards (`rewards`), not to evaluate"
            )
        reasons = {
            "evaluate.every": "previews need evaluate.prompts",
            "data.num_crops": "crop: center has one crop; set data.crop=random"
            if data.crop == "center"
            else "data.cache_reference cycles through fewer visits; raise it to the crops x train.num_draws",
            "data.cache_dir": "data.cache is false",
            "data.image_negative.variants": "data.cache_reference cycles through fewer draws; raise it to the variants",
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
        tree, label = plain(source), "config"
        for key, _ in flatten(tree):
            origin[key] = "python"
    else:
        path = find_config(str(source))
        tree, label = read_with_base(path, origin, seen=()), str(source)
    for override in sorted(overrides, key=starts_anew, reverse=True):  # else they would take back what came before them
        apply_override(tree, override, origin)
    apply_preset(tree, origin)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, label)) from None
    _check_plugins(config)
    return LoadedConfig(config, origin, label)


def dump(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(dump(config), sort_keys=False, allow_unicode=True)


def json_schema() -> str:
    """JSON Schema of the config, for editors."""
    return json.dumps(Config.model_json_schema(), indent=2)


def _check_plugins(config: Config) -> None:
    """Names resolve and options are known before anything is loaded."""
    from mmalign import registry

    if not config.method.name:
        raise ConfigError(f"method: give a `preset` or a `name`. Methods: {', '.join(registry.names('method'))}")
    sections = [config.rewards, config.evaluate.rewards, config.evaluate.held_out]
    try:
        family = registry.resolve("family", config.model.family)
        method_class = registry.resolve("method", config.method.name)
        given = config.method.options()
        options = registry.check_options("method", config.method.name, method_class, given, beside=("preset", "name"))
        # As parsed: what reads the config later must see the number, not the text it was written as.
        (config.method.model_extra or {}).update({name: options[name] for name in given})
        method = method_class(**options)  # a method is its settings alone; losses inside are checked here
        _check_fits(config, family, method)
        for reward in (reward for section in sections for reward in section):
            found = registry.resolve("reward", reward.name)
            registry.check_options("reward", reward.name, found, reward.options(), beside=("name",))
        if config.data.format != "auto":
            reader = registry.resolve("reader", config.data.format)
            registry.check_options("reader", config.data.format, reader, dict(config.data.options))
    except ValueError as error:
        raise ConfigError(" ".join(str(error).splitlines())) from error  # a plug-in's own error may have several


def _check_fits(config: Config, family: Any, method: Any) -> None:
    """Method and family belong together, and no key is set that neither of them reads."""
    for declared in ("loop", "sides", "needs_negative"):
        if not hasattr(method, declared):
            raise ValueError(
                f"method {config.method.name!r} does not declare `{declared}`: docs/how_a_method_and_a_model_meet.md says what "
                f"a method declares"
            )
    modality = getattr(family, "modality", None)
    kind = {"image": "surrogate", "text": "exact"}.get(str(modality))
    accepts = getattr(method, "accepts", None)
    if kind is not None and accepts is not None and kind not in accepts:
        raise ValueError(
            f"model.family {config.model.family!r} gives {kind} scores, but the configured losses are defined for "
            f"{' and '.join(sorted(accepts)) or 'no common kind of'} scores. See docs/methods.md for what goes together"
        )
    if config.train.stop is not None and hasattr(method, "logged") and kind is not None:
        config.train.stop.check_metric((*LOOP_METRICS, *method.logged(kind)))
    if getattr(method, "loop", "") == "online":
        if not hasattr(family, "rollout"):
            raise ValueError(
                f"method {config.method.name!r} samples and replays steps; family {config.model.family!r} cannot"
            )
        if getattr(method, "kernel", None) not in (None, *family.kernels):
            raise ValueError(
                f"method.kernel {method.kernel!r} does not fit family {config.model.family!r}: must be "
                f"{' or '.join(kernel for kernel in family.kernels if kernel != 'ode')}"
            )
        if not any(reward.weight for reward in config.rewards):
            raise ValueError(f"method {config.method.name!r} learns from rewards: name at least one under `rewards`")
    elif config.rewards:
        raise ValueError(
            "rewards: this method learns from fixed data and would ignore them; report them under evaluate.rewards"
        )
    if (
        getattr(method, "loop", "") == "offline"
        and getattr(method, "guidance_scale", 1) > 1
        and config.data.prompt_dropout
    ):
        raise ValueError(
            f"data.prompt_dropout = {config.data.prompt_dropout} with method.guidance_scale = {method.guidance_scale}: a row "
            f"without its prompt has nothing to be guided from, and would be trained {method.guidance_scale} times as hard. "
            f"Set data.prompt_dropout=0"
        )
    if config.data.image_negative is not None and not getattr(method, "needs_negative", True):
        raise ValueError(
            "data.image_negative would do nothing: none of the configured losses contrasts images (copo does)"
        )
    if getattr(method, "needs_negative", False) and modality == "image":
        raise ValueError(
            f"model.family {config.model.family!r} generates images; the configured losses contrast images shown to a "
            f"language model"
        )
    values, defaults = dict(flatten(dump(config))), dict(flatten(_defaults()))
    for key in (*getattr(family, "unread", ()), *getattr(method, "unread", ())):
        for name, value in values.items():
            if (name == key or name.startswith(f"{key}.")) and value != defaults.get(name, defaults.get(key)):
                raise ValueError(
                    f"{name} = {value!r} would do nothing: neither family {config.model.family!r} nor method "
                    f"{config.method.name!r} reads it. Remove it"
                )


def _defaults() -> dict[str, Any]:
    sections = ("model", "data", "train", "evaluate", "checkpoint", "run")
    return {
        name: {
            key: field.get_default(call_default_factory=True)
            for key, field in Config.model_fields[name].annotation.model_fields.items()  # type: ignore[union-attr]
        }
        for name in sections
    }


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
