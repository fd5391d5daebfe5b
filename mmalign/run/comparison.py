"""`mmalign grid`: runs, pipelines and LoRA files side by side on the same noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mmalign.builtin import resolve_path
from mmalign.config import Config, ConfigError, EvaluateConfig, ModelConfig, RewardConfig, load_config
from mmalign.evaluation.compare import compare_models
from mmalign.policies.load import default_device, load_policy
from mmalign.reward import load_rewards
from mmalign.run.environment import quiet_libraries


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
) -> None:
    """Sample the base of `run`, its result, and every `vs` model; write grid.png, report.html and report.json to `out`.

    Args:
        run: run folder (base and result are shown) or a config (its base alone).
        vs: run folders, pipeline folders, hub ids or LoRA files of the same family.

    Raises `ConfigError` if there is nothing to compare or no prompt.
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
    evaluate = EvaluateConfig(
        prompts=chosen,
        limit=limit or (config.evaluate.limit if prompts is None else None),
        seeds=seeds,
        guidance_scale=list(guidance) or config.evaluate.guidance_scale,
        num_steps=num_steps or config.evaluate.num_steps,
        batch_size=config.evaluate.batch_size,
        grid_prompts=config.evaluate.grid_prompts,
    )
    specs = [RewardConfig(name=name) for name in rewards] or [*config.evaluate.rewards, *config.evaluate.held_out]
    trained_on = {reward.name for reward in config.rewards}

    def models() -> Iterator[tuple[str, Any, Any]]:
        for label, model in entries:
            yield label, load_policy(model, data=config.data, train=False), "policy"

    report = compare_models(
        models(),
        evaluate,
        list(zip(load_rewards(specs, default_device()), (spec.name in trained_on for spec in specs), strict=True)),
        out,
        title=f"{config.model.path}: {' / '.join(label for label, _ in entries)}",
        progress=lambda phase, done, total: console.print(f"{phase} {done}/{total}") if done == total else None,
    )
    for name in ("grid.png", "report.html", "report.json"):
        console.print(f"  {out / name}", highlight=False, soft_wrap=True)
    console.print(f"  {report.headline}", highlight=False, soft_wrap=True)


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
    """A run folder, a LoRA (file, or folder with pytorch_lora_weights.safetensors), or a pipeline."""
    path = Path(resolve_path(spec))
    if (path / "config.yaml").is_file() and (path / "final").is_dir():
        other, tuned = open_run(spec)
        assert tuned is not None
        if other.model.family != config.model.family:
            raise ConfigError(f"{spec!r} is a {other.model.family} run, compared with {config.model.family}")
        return tuned
    if path.suffix == ".safetensors" or (path / "pytorch_lora_weights.safetensors").is_file():
        return base_model(config.model).model_copy(update={"adapters": [*config.model.adapters, spec]})
    return base_model(config.model).model_copy(update={"path": spec, "adapters": [], "revision": None, "variant": None})


def unique(label: str, taken: Sequence[str]) -> str:
    """`label`, or `label (2)` and so on."""
    number, name = 2, label
    while name in taken:
        name, number = f"{label} ({number})", number + 1
    return name
