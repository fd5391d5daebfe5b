"""Merging, overrides, presets and provenance of the configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmalign.config import ConfigError, json_schema, load_config

BASE = """
model: {family: sdxl, path: some/model, lora: {rank: 4}}
method: {preset: diffusion_dpo, losses: [{name: dpo, beta: 7}]}
data: {path: some/data}
train: {steps: 10, batch_size: 2, learning_rate: 1e-5}
output_dir: runs/base
"""


@pytest.fixture
def write(tmp_path: Path):
    def make(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    make("base.yaml", BASE)
    return make


def test_base_is_inherited_key_by_key(write):
    loaded = load_config(write("child.yaml", "base: base.yaml\ntrain: {steps: 20}\noutput_dir: runs/child\n"))
    assert loaded.config.train.steps == 20
    assert loaded.config.train.batch_size == 2
    assert loaded.config.model.lora is not None
    assert loaded.config.model.lora.rank == 4
    assert loaded.origin_of("train.steps").endswith("child.yaml")
    assert loaded.origin_of("train.batch_size").endswith("base.yaml")
    assert loaded.origin_of("train.schedule") == "default"


def test_child_can_switch_a_section_off(write):
    loaded = load_config(write("child.yaml", "base: base.yaml\nmodel: {lora: null}\n"))
    assert loaded.config.model.lora is None


def test_another_preset_starts_the_method_anew(write):
    """The base's losses belong to the base's method; a child that only names another preset must not keep them."""
    loaded = load_config(write("child.yaml", "base: base.yaml\nmethod: {preset: sft}\n"))
    assert loaded.config.method.options() == {"losses": [{"name": "sft"}]}
    assert (
        load_config(write("same.yaml", BASE), ["method.preset=mapo"]).config.method.options()["losses"][0]["name"]
        == "mapo"
    )


def test_another_data_format_starts_the_options_anew(write):
    """The base's options belong to its reader; the same reader, or one yet to be found, keeps them."""
    drawn = "data: {path: builtin:synthetic, format: synthetic, options: {num_pairs: 8}}"
    base = write("pairs.yaml", BASE.replace("data: {path: some/data}", drawn))
    child = write("rows.yaml", "base: pairs.yaml\ndata: {path: rows.jsonl, format: jsonl}\n")
    assert load_config(child).config.data.options == {}
    assert load_config(base, ["data.path=rows.jsonl", "data.format=jsonl"]).config.data.options == {}
    for kept in ("synthetic", "auto"):
        assert load_config(base, [f"data.format={kept}"]).config.data.options == {"num_pairs": 8}


def test_what_starts_a_section_anew_takes_back_no_other_override(write):
    overrides = [
        "data.options.id_column=key",
        "data.format=jsonl",
        "method.losses=[{name: mapo}]",
        "method.preset=mapo",
    ]
    for given in (overrides, overrides[::-1]):
        config = load_config(write("own.yaml", BASE), given).config
        assert config.data.options == {"id_column": "key"}
        assert config.method.options()["losses"] == [{"name": "mapo"}]


def test_a_method_says_what_it_reads_of_a_row(write, tmp_path):
    (tmp_path / "mine.py").write_text("class Mine:\n    loop = 'offline'\n    needs_negative = False\n")
    with pytest.raises(ConfigError, match=r"Mine.*does not declare `sides`"):
        load_config(write("own.yaml", BASE), [f"method.name={tmp_path}/mine.py:Mine"])


def test_preset_fills_what_is_not_given(write):
    loaded = load_config(write("own.yaml", BASE))
    assert loaded.config.method.name == "preference"
    assert loaded.config.method.options()["losses"] == [{"name": "dpo", "beta": 7}]
    assert loaded.origin_of("method.name") == "preset diffusion_dpo"


def test_overrides_are_yaml_and_reach_into_lists_and_nulls(write):
    path = write("own.yaml", BASE)
    loaded = load_config(
        path, ["train.learning_rate=2e-6", "model.lora=null", "evaluate.guidance_scale=[1, 5]", "train.ema.decay=0.5"]
    )
    assert loaded.config.train.learning_rate == 2e-6
    assert loaded.config.model.lora is None
    assert loaded.config.evaluate.guidance_scale == [1, 5]
    assert loaded.config.train.ema is not None
    assert loaded.origin_of("train.learning_rate") == "override train.learning_rate=2e-6"


def test_scientific_notation_without_a_dot_is_a_number(write):
    """Plain YAML 1.1 reads 1e-5 as a string."""
    assert load_config(write("own.yaml", BASE)).config.train.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + "train: {steps: 1}\n", "duplicate key 'train'"),
        ("base: self.yaml\n", "goes in a circle"),
        ("base: nowhere.yaml\n", "'nowhere.yaml' does not exist"),
        ("- a list\n", "expected a mapping"),
        (BASE.replace("preset: diffusion_dpo", "preset: difusion_dpo"), r"did you mean 'diffusion_dpo'"),
        (BASE.replace("steps: 10", "steps: -1"), r"train\.steps = -1"),
        (BASE.replace("  ", " ").replace("output_dir: runs/base", ""), "missing key 'output_dir'"),
        (BASE.replace("family: sdxl", "family: sdxll"), "did you mean 'sdxl'"),
        (BASE.replace("beta: 7", "beta: -7"), "beta = -7"),
        (BASE.replace("some/data", "some/data, num_crops: 2"), "crop: center has one crop"),
        (
            BASE.replace("some/data", "some/data, crop: random, num_crops: 2, cache_reference: 2").replace(
                "steps: 10", "steps: 10, num_draws: 2"
            ),
            r"data\.num_crops would do nothing: data\.cache_reference cycles through fewer visits",
        ),
    ],
)
def test_mistakes_are_named(write, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write("self.yaml", text))


@pytest.mark.parametrize("override", ["train.steps", "=3", "train.steps.deep=1", "train.steps=[1"])
def test_malformed_overrides_are_named(write, override):
    with pytest.raises(ConfigError, match="override"):
        load_config(write("own.yaml", BASE), [override])


def test_resolved_config_reads_back_as_itself(write, tmp_path):
    from mmalign.config import to_yaml

    first = load_config(write("own.yaml", BASE)).config
    assert load_config(write("resolved.yaml", to_yaml(first))).config == first


def test_schema_describes_every_section_for_editors():
    schema = json.loads(json_schema())
    assert {"model", "method", "data", "train", "evaluate", "checkpoint", "run"} <= schema["properties"].keys()
    assert schema["$defs"]["TrainConfig"]["properties"]["learning_rate"]["description"]
    assert schema["$defs"]["TrainConfig"]["additionalProperties"] is False
