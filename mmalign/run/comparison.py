"""`mmalign grid`: runs, models and LoRA files side by side, on the same noise or the same questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mmalign import registry
from mmalign.builtin import resolve_path
from mmalign.config import Config, ConfigError, ModelConfig, RewardConfig, load_config, reward_identity
from mmalign.evaluation import check_evaluation, compare_policies
from mmalign.policies.load import default_device, load_policy
from mmalign.reward import load_rewards
from mmalign.run.environment import quiet_libraries

LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


def compare(
    run: str,
    *,
    vs: Sequence[str],
    prompts: str | None,
    seeds: int,
    rewards: Sequence[str],
    guidance: Sequence[float],
    num_steps: int | None,
    limit: int | None,
    out: Path,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
) -> None:
    """Sample the base of `run`, its result, and every `vs` model; write grid.png, report.html and report.json to `out`.

    Args:
        run: run folder (base and result are shown) or a config (its base alone).
        vs: run folders, model folders, hub ids or LoRA files and folders of the same family.
        guidance, num_steps: for models that make images; None or empty: as the run's config says.
        temperature, max_new_tokens: for language models; None: as the run's config says.

    Raises `ConfigError` if there is nothing to compare, no prompt, or a setting that the family does not read.
    """
    quiet_libraries()
    console = Console()
    config, tuned = open_run(run)
    entries = [("base", base_model(config.model))]
    if tuned is not None:
        entries.append((Path(run).name, tuned))
    for other in vs:
        taken = [label for label, _ in entries]
        entries.append((unique(Path(other).name or other, taken), other_model(config, other)))
    if len(entries) < 2:
        raise ConfigError(
            f"{run!r} is a config: nothing to compare its base model with. Give a run folder or --vs MODEL"
        )
    chosen = config.evaluate.prompts if prompts is None else prompts
    if chosen is None:
        raise ConfigError("no prompts: give --prompts FILE (or builtin:attributes_heldout)")
    family = registry.resolve("family", config.model.family)
    given = {
        "guidance_scale": list(guidance) or None,
        "num_steps": num_steps,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
    }
    given = {key: value for key, value in given.items() if value is not None}
    idle = [key for key in given if f"evaluate.{key}" in getattr(family, "unread", ())]
    if idle:
        raise ConfigError(f"{idle[0]} = {given[idle[0]]!r} would do nothing: {config.model.family} models have none")
    limit = limit or (config.evaluate.limit if prompts is None else None)
    evaluate = config.evaluate.model_copy(update={"prompts": chosen, "limit": limit, "seeds": seeds, **given})
    specs = [RewardConfig(name=name) for name in rewards] or [*config.evaluate.rewards, *config.evaluate.held_out]
    trained_on = {reward_identity(reward) for reward in config.rewards}
    scorers = load_rewards(specs, default_device())
    check_evaluation(family.modality, evaluate, scorers)

    def models() -> Iterator[tuple[str, Any, Any]]:
        for label, model in entries:
            yield label, load_policy(model, data=config.data, train=False), "policy"

    report = compare_policies(
        family.modality,
        models(),
        evaluate,
        [(scorer, reward_identity(spec) in trained_on) for scorer, spec in zip(scorers, specs, strict=True)],
        out,
        title=f"{config.model.path}: {' / '.join(label for label, _ in entries)}",
        progress=lambda phase, done, total: console.print(f"{phase} {done}/{total}") if done == total else None,
    )
    for name in ("grid.png", "report.html", "report.json"):
        console.print(f"  {out / name}", highlight=False, soft_wrap=True)
    for line in (report.headline, *(f"warning: {text}" for text in report.warnings)):
        console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)


def open_run(spec: str) -> tuple[Config, ModelConfig | None]:
    """The config behind a run folder or config file, and the run's result where there is one."""
    folder = Path(spec)
    if not folder.is_dir():
        return load_config(spec).config, None
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{spec!r} holds no config.yaml: not a run folder. Give a run folder or a config")
    config = load_config(folder / "config.yaml").config
    final = folder / "final"
    if not final.is_dir():
        raise ConfigError(f"{spec!r} has no final/ yet: the run is not finished. Start it again to finish it")
    return config, result_model(config.model, final)


def base_model(model: ModelConfig) -> ModelConfig:
    return model.model_copy(update={"lora": None})


def result_model(model: ModelConfig, final: Path) -> ModelConfig:
    """The exported result as something to load."""
    if model.lora is not None:
        return model.model_copy(update={"lora": None, "adapters": [*model.adapters, str(final)]})
    return model.model_copy(update={"path": str(final), "revision": None, "variant": None})


def other_model(config: Config, spec: str) -> ModelConfig:
    """A run folder, a LoRA (a file, or a folder in the format of diffusers or PEFT), or a model."""
    path = Path(resolve_path(spec))
    if (path / "config.yaml").is_file() and (path / "final").is_dir():
        other, tuned = open_run(spec)
        assert tuned is not None
        if other.model.family != config.model.family:
            raise ConfigError(f"{spec!r} is a {other.model.family} run, compared with {config.model.family}")
        return tuned
    if path.suffix == ".safetensors" or any((path / name).is_file() for name in LORA_FILES):
        return base_model(config.model).model_copy(update={"adapters": [*config.model.adapters, spec]})
    return base_model(config.model).model_copy(update={"path": spec, "adapters": [], "revision": None, "variant": None})


def unique(label: str, taken: Sequence[str]) -> str:
    """`label`, or `label (2)` and so on."""
    number, name = 2, label
    while name in taken:
        name, number = f"{label} ({number})", number + 1
    return name
