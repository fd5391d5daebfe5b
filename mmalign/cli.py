"""The command line. Every heavy import sits inside its command, so that `--help` answers at once.

`mmalign train CONFIG` goes: this file -> trainers/offline.py or online.py -> the method -> mmalign/losses.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmalign import __version__

if TYPE_CHECKING:
    from mmalign.run.folder import RunResult

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
data_app = typer.Typer(no_args_is_help=True, help="Check, audit and cache training data.")
rewards_app = typer.Typer(no_args_is_help=True, help="Reward models: list, check, start your own.")
app.add_typer(data_app, name="data")
app.add_typer(rewards_app, name="rewards")

ConfigArgument = Annotated[str, typer.Argument(help="YAML file or the name of a shipped config.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Overrides such as train.steps=100.", metavar="[KEY=VALUE]...")
]
OptionPairs = Annotated[list[str] | None, typer.Option(help="Option of the reward as key=value; repeatable.")]


def train(config: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunResult:
    """Train from a config; continues by itself where the run folder stopped.

    Args:
        config: YAML path, the name of a shipped config, or a mapping with the same keys.
        overrides: `key=value` strings.

    Returns the run folder and its summary; `.report` holds report.json.
    Raises `ConfigError` or `DataError` (both `ValueError`) on input that cannot be used.
    """
    from mmalign import registry
    from mmalign.config import load_config

    loaded = load_config(config, overrides)
    method = registry.resolve("method", loaded.config.method.name)
    return registry.resolve("loop", method.loop)(loaded)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Preference alignment for image and video diffusion/flow models and multimodal language models."""
    if version:
        typer.echo(f"mmalign {__version__}")
        raise typer.Exit


@app.command("train")
def train_command(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Train. Continues by itself when output_dir holds a checkpoint of the same config."""
    result = train(config, overrides or [])
    if result.summary["status"] == "interrupted":
        raise typer.Exit(130)


@app.command()
def grid(
    run: Annotated[
        str, typer.Argument(help="Run folder, or a config whose base model to show.", metavar="RUN_OR_CONFIG")
    ],
    vs: Annotated[list[str] | None, typer.Option(help="Another run, model folder, hub id or LoRA; repeatable.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompt or question file, or builtin:NAME. Default: the run's own.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Images or answers per prompt.")] = 4,
    rewards: Annotated[str | None, typer.Option(help="Comma-separated rewards. Default: the run's own.")] = None,
    guidance: Annotated[str | None, typer.Option(help="Comma-separated guidance scales.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="Language models: 0 is greedy.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Language models: longest answer.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N prompts.")] = None,
    out: Annotated[str, typer.Option(help="Folder for grid.png, report.html and report.json.")] = "comparison",
) -> None:
    """Compare models on the same prompts from the same initial noise: grid, report, win rates."""
    from mmalign.run.comparison import compare

    compare(
        run,
        vs=vs or [],
        prompts=prompts,
        seeds=seeds,
        rewards=_split(rewards),
        guidance=[float(value) for value in _split(guidance)],
        num_steps=steps,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        limit=limit,
        out=Path(out),
    )


@app.command()
def score(
    data: Annotated[str, typer.Argument(help="Image, image folder, JSONL or dataset.", metavar="DATA")],
    reward: Annotated[str, typer.Option(help="Reward: name, package.module:Name or file.py:Name.")],
    out: Annotated[str | None, typer.Option(help="JSONL file. Default: standard output.")] = None,
    option: OptionPairs = None,
    format: Annotated[str, typer.Option(help="Reader of a data set.")] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first N.")] = None,
) -> None:
    """Score images, or both sides of pairs, with a reward."""
    from mmalign.policies.load import default_device
    from mmalign.scoring import score_data

    spec = _reward_config(reward, option)
    raise typer.Exit(score_data(spec, data, out, device=default_device(), format=format, limit=limit))


@app.command()
def doctor(
    config: Annotated[str | None, typer.Argument(help="Also check this config.", metavar="[CONFIG]")] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Environment and attention backends; with a config also golden numbers, memory estimate and data audit."""
    from mmalign.run.doctor import doctor as examine

    raise typer.Exit(examine(config, overrides or [], as_json=as_json))


@app.command()
def explain(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Every resolved value with its origin, and the path through the code from command to loss."""
    from mmalign.run.explain import explain as show

    show(config, overrides or [])


@app.command()
def schema() -> None:
    """JSON Schema of the config, for editors."""
    from mmalign.config import json_schema

    typer.echo(json_schema())


@data_app.command("check")
def data_check(
    config: ConfigArgument,
    overrides: Overrides = None,
    out: Annotated[str | None, typer.Option(help="Where to write audit.json.")] = None,
) -> None:
    """Audit the training data of a config: counts, duplicates, contradictions, broken images."""
    from mmalign.run.doctor import check_data

    raise typer.Exit(check_data(config, overrides or [], Path(out or "audit.json")))


@data_app.command("cache")
def data_cache(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Encode every unique image and prompt of a config once, ahead of training."""
    from mmalign.run.doctor import cache_data

    cache_data(config, overrides or [])


@rewards_app.command("list")
def rewards_list() -> None:
    """Registered rewards with their options and ranges."""
    from mmalign.scoring import list_rewards

    list_rewards()


@rewards_app.command("check")
def rewards_check(
    spec: Annotated[str, typer.Argument(help="Name, package.module:Name or file.py:Name.")],
    option: OptionPairs = None,
    data: Annotated[str | None, typer.Option(help="Images or data set whose columns the reward needs.")] = None,
) -> None:
    """Conformance of a reward: shape, dtype, NaN, batching, order, determinism, range."""
    from mmalign.scoring import check_reward

    raise typer.Exit(check_reward(_reward_config(spec, option), data=data))


@rewards_app.command("new")
def rewards_new(name: Annotated[str, typer.Argument(help="Name of the reward; writes NAME.py.")]) -> None:
    """Write a commented starting point for your own reward."""
    from mmalign.scoring import new_reward

    new_reward(name)


def _reward_config(spec: str, options: list[str] | None) -> Any:
    """The reward as a config section, its options parsed as YAML like any override."""
    from mmalign.config import RewardConfig, parse_value

    pairs = dict(parse_value(pair) for pair in options or [])
    return RewardConfig(name=spec, **pairs)


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()] if text else []


def main() -> None:
    """Entry point: bad input becomes one line on stderr and exit code 2; MMALIGN_DEBUG=1 shows the traceback."""
    if find_spec("mmalign.configs") is None:
        print(
            "error: Python found the folder `mmalign` of a checkout, not the installed package; "
            "run `pip install -e .` there, or start from another folder",
            file=sys.stderr,
        )
        sys.exit(2)
    try:
        app()
    except KeyboardInterrupt:
        print("interrupted; start the same command again to continue", file=sys.stderr)
        sys.exit(130)
    except (ValueError, RuntimeError, FloatingPointError, OSError) as error:
        if os.environ.get("MMALIGN_DEBUG") or not _is_for_users(error):
            raise
        print(f"error: {' '.join(line.strip() for line in str(error).splitlines())}", file=sys.stderr)
        if type(error).__name__ == "OutOfMemoryError":
            print(
                "lower train.batch_size and raise train.accumulate, set train.score_chunk or "
                "model.gradient_checkpointing=true, or train a LoRA; `mmalign doctor CONFIG` estimates the memory",
                file=sys.stderr,
            )
        sys.exit(2)


def _is_for_users(error: BaseException) -> bool:
    """Errors that name a value and a fix are for users; anything else is a bug and keeps its traceback."""
    module = type(error).__module__
    if type(error).__name__ == "OutOfMemoryError":
        return True
    return module.startswith("mmalign") or type(error) in (ValueError, FloatingPointError) or isinstance(error, OSError)


if __name__ == "__main__":
    main()
