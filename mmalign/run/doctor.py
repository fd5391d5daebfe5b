"""`mmalign doctor`: what this machine can do, and whether a config would do what it says. Also the `data` commands."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmalign import attention, registry
from mmalign.config import Config, load_config
from mmalign.data.audit import check_data as audit_data
from mmalign.data.batches import Batches
from mmalign.data.cache import FeatureCache, build_cache, cache_folder
from mmalign.data.features import make_features
from mmalign.data.groups import Groups
from mmalign.data.load import load_rows
from mmalign.policies.load import default_device, load_policy
from mmalign.run.atomic import write_text
from mmalign.run.environment import quiet_libraries
from mmalign.run.optim import check_optimizer
from mmalign.run.preflight import PreflightError, probe, probe_rollout
from mmalign.run.reference import score_reference
from mmalign.run.tracking import check_tracker
from mmalign.types import Row

PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "open_clip_torch", "xformers")
GIB = 2**30
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0, "adafactor": 0.01}


def doctor(source: str | None, overrides: Sequence[str], *, as_json: bool) -> int:
    """Print the findings; returns 0 if nothing is wrong, 1 otherwise."""
    quiet_libraries()
    console = Console(stderr=as_json)
    findings: dict[str, Any] = {"environment": environment(), "attention": attention_backends()}
    problems: list[str] = []
    if source is not None:
        config = load_config(source, overrides).config
        findings["config"], problems = examine_config(config, console)
    findings["problems"] = problems
    if as_json:
        print(json.dumps(findings, indent=2, default=str))
    else:
        show(console, findings)
    return 1 if problems else 0


def environment() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    device = default_device()
    found["device"] = torch.cuda.get_device_name() if device == "cuda" else f"{device} ({platform.machine()})"
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        found["device memory"] = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    return found


def attention_backends() -> dict[str, dict[str, Any]]:
    """Each backend tried on this device, not merely imported."""
    device = default_device()
    results = [attention.probe(backend, device) for backend in ("sdpa", "xformers", "flash")]
    chosen = attention.select("auto", torch.device(device), torch.bfloat16)
    return {r.backend: {"usable": r.usable, "detail": r.detail, "auto": r.backend == chosen} for r in results}


def examine_config(config: Config, console: Console) -> tuple[dict[str, Any], list[str]]:
    """Golden numbers on the config's own first batch, memory by part, data audit."""
    problems = missing_packages(config)
    policy = load_policy(config.model, data=config.data, seed=config.train.seed)
    audit = audit_data(
        config.data,
        resolution=getattr(policy, "resolution", None),
        cut_prompts=getattr(policy, "cut_prompts", None),
    )
    problems += [f"data: {f.count} rows {f.meaning}" for f in audit.findings if f.severity == "error"]
    row_set = load_rows(config.data, seed=config.train.seed)
    method = registry.resolve("method", config.method.name)(**config.method.options())
    method.check_rows(row_set.rows)
    features = make_features(
        policy,
        config.data,
        None,
        seed=config.train.seed,
        rows=row_set.rows,
        negatives=method.needs_negative,
        sides=method.sides,
    )
    examine = examine_rollout if method.loop == "online" else examine_scores
    golden: list[str] = []
    try:
        golden, forward = examine(config, policy, method, row_set.rows, features)
        memory = memory_estimate(config, policy, method, forward)
    except PreflightError as error:
        problems.append(f"golden numbers: {error}")
        memory = {}
    found = {
        "policy": {"family": config.model.family, "path": config.model.path, "attention": policy.attention},
        "golden": golden,
        "memory": memory,
        "data": json.loads(audit.to_json()),
        "effective_batch": method.group_size * method.prompts_per_rollout // method.updates_per_rollout
        if method.loop == "online"
        else config.train.batch_size * config.train.accumulate,
    }
    return found, problems


def missing_packages(config: Config) -> list[str]:
    """What the config asks for and is not installed, in the words with which a run would refuse it."""
    missing = []
    for check in (partial(check_optimizer, config.train), partial(check_tracker, config.run.tracker)):
        try:
            check()
        except ValueError as error:
            missing.append(str(error))
    return missing


def examine_scores(
    config: Config, policy: Any, method: Any, rows: Sequence[Row], features: Any
) -> tuple[list[str], Callable[[], Any]]:
    """What the preflight of a run on fixed data says, and its training forward."""
    batches = Batches(
        rows,
        features,
        config.data,
        seed=config.train.seed,
        batch_size=min(config.train.batch_size, len(rows)),
        accumulate=1,
        num_draws=config.train.num_draws,
        negatives=method.needs_negative,
    )
    batch = batches.make(batches.visits(0, 0))
    chunk = config.train.score_chunk
    reference_R = score_reference(policy, method, batch, chunk) if method.needs_reference else None
    found = probe(policy, method, batch, reference_R, dtype=config.model.dtype, cached=False, chunk=chunk)
    requests = method.requests(batch)[:chunk]
    return found.lines(), lambda: policy.score(requests)


def examine_rollout(
    config: Config, policy: Any, method: Any, rows: Sequence[Row], features: Any
) -> tuple[list[str], Callable[[], Any]]:
    """What the preflight of an online run says, and its training forward."""
    groups = Groups.of(method, rows, features, config.train)
    trajectory = method.rollout(policy, groups, groups.mine(0)[0][0], 0)
    lines = probe_rollout(policy, trajectory, dtype=config.model.dtype)
    replay = policy.replayer(trajectory)
    return lines, lambda: replay(0)


def memory_estimate(
    config: Config, policy: Any, method: Any, forward: Callable[[], Any]
) -> dict[str, dict[str, float]]:
    """Parameters and bytes by part, counted on the loaded model; activations as autograd really saves them.

    Left out: allocator overhead, kernels' workspaces, the transient peak inside one checkpointed block, and encoders that
    leave the device while training because their output is cached.
    """
    parts: dict[str, dict[str, float]] = {}
    trained = {id(parameter) for _, parameter in policy.trainable()}
    leave = config.data.cache and policy.device.type != "cpu"
    released = policy.release_encoders() if leave else []
    for role, module in policy.modules().items():
        frozen = [p for p in module.parameters() if id(p) not in trained]
        if frozen and role not in released:
            parts[f"{role} (frozen)"] = _part(frozen)
    parameters = [parameter for _, parameter in policy.trainable()]
    parts["trained weights"] = _part(parameters)
    count = sum(p.numel() for p in parameters)
    parts["gradients"] = {"parameters": 0, "bytes": 4.0 * count}
    parts["optimizer"] = {"parameters": 0, "bytes": OPTIMIZER_BYTES[config.train.optimizer] * count}
    if config.train.ema is not None:
        parts["moving average"] = {"parameters": 0, "bytes": 4.0 * count}
    if method.needs_reference and config.model.lora is None and not config.data.cache_reference:
        loaded = {id(p) for module in policy.modules().values() for p in module.parameters()}
        with policy.view("reference"):
            copy = [p for module in policy.modules().values() for p in module.parameters() if id(p) not in loaded]
        parts["reference copy"] = _part(copy)
    parts["activations"] = {"parameters": 0, "bytes": float(saved_bytes(policy, forward))}
    parts["total"] = {
        "parameters": sum(part["parameters"] for part in parts.values()),
        "bytes": sum(part["bytes"] for part in parts.values()),
    }
    return parts


def saved_bytes(policy: Any, forward: Callable[[], Any]) -> int:
    """Bytes of distinct storages that one forward keeps for its backward, weights excluded."""
    weights = {p.untyped_storage().data_ptr() for module in policy.modules().values() for p in module.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(seen.values())


def _part(parameters: Sequence[torch.nn.Parameter]) -> dict[str, float]:
    return {
        "parameters": sum(p.numel() for p in parameters),
        "bytes": float(sum(p.numel() * p.element_size() for p in parameters)),
    }


def show(console: Console, findings: dict[str, Any]) -> None:
    table = Table("what", "value", box=None, header_style="bold", title="environment", title_justify="left")
    for name, value in findings["environment"].items():
        table.add_row(name, str(value))
    for name, state in findings["attention"].items():
        mark = "usable" if state["usable"] else "not usable"
        auto = " (auto takes this)" if state["auto"] else ""
        table.add_row(f"attention {name}", f"{mark}{auto}: {state['detail']}")
    console.print(table)
    config = findings.get("config")
    if config is not None:
        table = Table("part", "parameters", "GiB", box=None, header_style="bold", title="memory", title_justify="left")
        for name, part in config["memory"].items():
            table.add_row(
                name, f"{part['parameters']:,.0f}" if part["parameters"] else "", f"{part['bytes'] / GIB:.3f}"
            )
        console.print(table)
        for line in config["golden"]:
            console.print(f"golden: {line}", highlight=False, soft_wrap=True)
        counts = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in config["data"]["counts"].items())
        console.print(f"data: {counts}", highlight=False, soft_wrap=True)
        for finding in config["data"]["findings"]:
            if finding["severity"] == "warning":
                console.print(f"data: {finding['count']} rows: {finding['meaning']}", highlight=False, soft_wrap=True)
    for problem in findings["problems"]:
        console.print(f"[red]problem[/] {escape(problem)}", highlight=False, soft_wrap=True)
    if not findings["problems"]:
        console.print("no problems found")


def check_data(source: str, overrides: Sequence[str], out: Path) -> int:
    """Audit a config's data; prints a table and writes `out`. Returns 1 if something would stop training."""
    audit = audit_data(load_config(source, overrides).config.data)
    console = Console()
    console.print(audit.to_table())
    write_text(out, audit.to_json())
    console.print(f"  {out}", highlight=False, soft_wrap=True)
    return 1 if audit.has_errors else 0


def cache_data(source: str, overrides: Sequence[str]) -> None:
    """Fill the latent and text cache of a config."""
    quiet_libraries()
    config = load_config(source, overrides).config
    console = Console()
    row_set = load_rows(config.data, seed=config.train.seed)
    policy = load_policy(config.model, data=config.data, seed=config.train.seed)
    folder = cache_folder(config.data)
    method = registry.resolve("method", config.method.name)(**config.method.options())
    report = build_cache(
        policy,
        row_set.rows,
        config.data,
        FeatureCache(folder),
        seed=config.train.seed,
        negatives=method.needs_negative,
        sides=method.sides,
    )
    console.print(f"cache {folder}: {report}", highlight=False, soft_wrap=True)
