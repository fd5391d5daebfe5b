"""README.md of the pipeline folders: what the model is, how it was made, how well it follows captions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines import Family

PREVIEW_CARD = "# {name}\n\nPreview written during training; scores are not measured yet.\n"


def card_text(family: Family, facts: dict) -> str:
    """The card of one scored pipeline; `{bytes}` is filled in on export.

    Args:
        family: names the pipeline class, the objective and the arguments that every call needs.
        facts: card.json's content, without "bytes".
    """
    rows = []
    for tier, table in facts["heldout"].items():
        rows += [score_row(tier, key, s) for key, s in table.items()]
        s = facts["vae_ceiling"][tier]
        rows.append(f"| {tier} | VAE ceiling | {s['graded']:.3f} | {s['fraction']:.3f} | {s['all_right']:.3f} |")
    for name, table in facts.get("heldout_variants", {}).items():
        rows += [score_row(f"attributes, {name}", key, s) for key, s in table.items()]
    table = "\n".join(rows)
    sizes = ", ".join(f"{n} {k:,}" for n, k in facts["parameters"].items())
    dev = ", ".join(f"{k}: {v:.2f}" for k, v in facts["dev_all_right_by_step"].items())
    cut = facts["total_steps"] < facts["schedule_steps"]
    schedule = f" (of a schedule of {facts['schedule_steps']})" if cut else ""
    class_name = family.pipeline_class.__name__
    guidance, steps = facts["guidance_scale"], facts["num_inference_steps"]
    call = {"guidance_scale": f"{guidance:g}", "num_inference_steps": steps, **family.call}
    arguments = ", ".join(f"{name}={value}" for name, value in call.items())
    loading = ", ".join([f'"assets/{family.name}"', *(f"{name}={value}" for name, value in family.load.items())])
    return f"""# {family.name}

A real `{class_name}` at tiny width, trained on the mmalign synthetic world: {facts["image_size_px"]} px images,
8 x 8 x 4 latents, fp16 on disk, {{bytes:,}} bytes in all. Deliberately imperfect: it often gets a part of its
caption wrong, which is what preference training is there to repair.

```python
from diffusers import {class_name}

pipe = {class_name}.from_pretrained({loading})
prompt = "a large red circle on a white background"
pipe(prompt, {arguments}).images[0]
```

| | |
|---|---|
| data | {facts["num_renders"]:,} renders of train captions, one in five of the relations tier; no held-out caption anywhere |
| objective | {family.objective.description}; text encoders trained jointly |
| regularisation | caption dropout {facts["caption_dropout"]} to the empty string, EMA {facts["ema_decay"]} |
| steps, batch, seed | {facts["chosen_step"]} of {facts["total_steps"]}{schedule}, {facts["batch_size"]}, {facts["seed"]} |
| parameters | {sizes} |
| command | `python assets/build/vae.py && {facts["command"]}` |

The checkpoint was chosen on the 32 dev captions: all-right share at guidance {guidance:g} nearest to
{facts["target_all_right"]}, among {dev}.
Held-out captions were scored once by the exact scorer (`mmalign.synthetic.scorer`), 4 images each,
{steps} {family.objective.sampler} steps where nothing else is said:

| tier | guidance | graded | fraction | all right |
|---|---|---|---|---|
{table}

Unconditional prompt: the empty string (not zeroed embeddings). `vae.config.scaling_factor` is 0.5; the latents' channel
means and deviations are folded into the VAE's 1 x 1 convolutions.
{family.objective.caution} {family.note}
"""


def score_row(what: str, key: str, s: dict[str, float]) -> str:
    guidance = key.removeprefix("guidance_")
    share = f"{s['all_right']:.3f} ± {s['all_right_standard_error']:.3f}"
    return f"| {what} | {guidance} | {s['graded']:.3f} | {s['fraction']:.3f} | {share} |"
