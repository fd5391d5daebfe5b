"""README.md of every shipped folder, from its card.json alone: what it is, how it was made, what it scores.

    python assets/build/cards.py        # count the bytes again and write all READMEs from the committed card.json files

The build scripts end with `write_card`; a test holds the committed READMEs against `readme`.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path

ASSETS_DIR = Path(__file__).resolve().parents[1]
WRITTEN = ("card.json", "README.md")
CALL_ARGUMENTS = ("guidance_scale", "num_inference_steps", "max_sequence_length")


def readme(facts: dict) -> str:
    """The README of one folder.

    Args:
        facts: card.json's content. Raises `KeyError` with the name of a fact that is missing.
    """
    if facts.get("preview"):
        return f"# {facts['name']}\n\nPreview written during training; scores are not measured yet.\n"
    return CARDS[facts["name"]](facts)


def write_card(folder: Path, facts: dict) -> None:
    """Finish a folder: card.json for programs and README.md for people. Sets "bytes" to what the other files hold."""
    others = [path for path in folder.rglob("*") if path.is_file() and path.name not in WRITTEN]
    facts = facts | {"bytes": sum(path.stat().st_size for path in others)}
    (folder / "card.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(readme(facts), encoding="utf-8")


def pipeline(facts: dict) -> str:
    class_name, vae = facts["pipeline_class"], facts["vae_facts"]
    guidance, steps = facts["guidance_scale"], facts["num_inference_steps"]
    cut = facts["total_steps"] < facts["schedule_steps"]
    schedule = f" (of a schedule of {facts['schedule_steps']})" if cut else ""
    loading = ", ".join([f'"assets/{facts["name"]}"', *(f"{name}={value}" for name, value in facts["load"].items())])
    arguments = ", ".join(f"{name}={facts[name]:g}" for name in CALL_ARGUMENTS if name in facts)
    sizes = ", ".join(f"{name} {number:,}" for name, number in facts["parameters"].items())
    dev = ", ".join(f"{step}: {share:.2f}" for step, share in facts["dev_all_right_by_step"].items())
    remarks = [
        "Unconditional prompt: the empty string (not zeroed embeddings).",
        f"`vae.config.scaling_factor` is {vae['scaling_factor']}; the latents' channel means and deviations are folded",
        "into the VAE's 1 x 1 convolutions.",
        *facts["remarks"],
    ]
    note = "\n" + wrapped(f"Note: {facts['note']}") if "note" in facts else ""
    return f"""# {facts["name"]}

A real `{class_name}` at tiny width, trained on the mmalign synthetic world: {facts["image_size_px"]} px images,
8 x 8 x 4 latents, fp16 on disk, {facts["bytes"]:,} bytes in all. Deliberately imperfect: it often gets a part of its
caption wrong, which is what preference training is there to repair.

```python
from diffusers import {class_name}

pipe = {class_name}.from_pretrained({loading})
prompt = "a large red circle on a white background"
pipe(prompt, {arguments}).images[0]
```

| | |
|---|---|
| data | {facts["num_renders"]:,} renders of train captions, {facts["relations_share"]:.0%} of them of the relations tier, \
drawn once with seed {facts["seed"]}; no held-out caption anywhere |
| objective | {facts["objective"]}; text encoders trained jointly |
| regularisation | caption dropout {facts["caption_dropout"]} to the empty string, EMA {facts["ema_decay"]} |
| steps, batch, seed | {facts["chosen_step"]} of {facts["total_steps"]}{schedule}, {facts["batch_size"]}, {facts["seed"]} |
| parameters | {sizes} |
| VAE, one for all pipelines | {vae["steps"]} steps, then {vae["decoder_steps"]} of the decoder alone, \
batch {vae["batch_size"]}, seed {vae["seed"]}; fresh renders of train captions, {vae["relations_share"]:.0%} relations |
| command | `python assets/build/vae.py && {facts["command"]}` |

The checkpoint was chosen on the 32 dev captions: all-right share at guidance {guidance:g} nearest to
{facts["target_all_right"]}, among {dev}.
Held-out captions were scored once by the exact scorer (`mmalign.synthetic.scorer`), 4 images each,
{steps} {facts["sampler"]} steps where nothing else is said:

| tier | guidance | graded | fraction | all right |
|---|---|---|---|---|
{table(pipeline_scores(facts))}

{wrapped(" ".join(remarks))}{note}"""


def pipeline_scores(facts: dict) -> list[list[str]]:
    """One row per tier and guidance scale, with the tier's VAE ceiling below."""
    rows = []
    for tier, by_guidance in facts["heldout"].items():
        rows += [[tier, *score_cells(key, scores)] for key, scores in by_guidance.items()]
        ceiling = facts["vae_ceiling"][tier]
        rows.append([tier, "VAE ceiling", *(f"{ceiling[name]:.3f}" for name in ("graded", "fraction", "all_right"))])
    for name, by_guidance in facts.get("heldout_variants", {}).items():
        rows += [[f"attributes, {name}", *score_cells(key, scores)] for key, scores in by_guidance.items()]
    return rows


def score_cells(key: str, scores: dict[str, float]) -> list[str]:
    share = f"{scores['all_right']:.3f} ± {scores['all_right_standard_error']:.3f}"
    return [key.removeprefix("guidance_"), f"{scores['graded']:.3f}", f"{scores['fraction']:.3f}", share]


def table(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def wrapped(text: str) -> str:
    return textwrap.fill(text, width=120, break_long_words=False, break_on_hyphens=False) + "\n"


def clip(facts: dict) -> str:
    drawn = facts["captions_per_step"]
    return f"""# clip-tiny

An open_clip CLIP of the mmalign synthetic world (ViT, 64 px, patch 8, {facts["parameters"]:,} parameters, fp16 on disk).

```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:assets/clip-tiny")
tokenizer = open_clip.get_tokenizer("local-dir:assets/clip-tiny")
model.eval()  # open_clip hands it over in train mode
```

| | |
|---|---|
| data | fresh renders every step of the {drawn["attributes"]} train captions (attributes) and {drawn["relations"]} of the \
train captions (relations), mild blur and noise |
| steps, seed | {facts["steps"]}, {facts["seed"]} |
| size | {facts["bytes"]:,} bytes |
| recall@1, held-out captions, {facts["num_distractors"]} one-word distractors | {facts["recall_at_1_heldout"]:.3f} \
(chance 0.111; {facts["num_images"]} images) |
| recall@1, dev captions | {facts["recall_at_1_dev"]:.3f} |
| height of the object read linearly from the normalised image embedding, R2 on held-out captions | \
{facts["height_r2_heldout"]:.3f} |
| command | `{facts["command"]}` |

During training a linear head also regressed the object's centre from the image embedding (weight {facts["centre_weight"]});
it is not shipped. Texts longer than {facts["context_length"]} tokens are cut; words outside the world are spelled in letters.
"""


def aesthetic(facts: dict) -> str:
    leak = facts["caption_leak"]
    means = [
        [kind, word, f"{found['property']:.2f}", f"{found['head']:.2f}"]
        for kind, words in leak["mean_by_word"].items()
        for word, found in words.items()
    ]
    share = leak["share_between_captions"]
    return f"""# aesthetic-tiny

An aesthetic head in the layout of LAION's improved predictor v2 (`layers.{{0,2,4,6,7}}.{{weight,bias}}`, linear layers
with dropout between), fitted to the L2-normalised image embedding of `clip-tiny`.

Property: **{facts["property"]}**.
No caption of the attributes tier mentions it and its mean is the same for every word. The head estimates it from an
embedding that also holds what the caption names, and is not free of that: see below.

| | |
|---|---|
| input | {facts["input_dim"]} numbers, `clip-tiny` image embedding divided by its L2 norm |
| output | one number, about 2.5 to 7.5 on real scenes |
| data | {facts["num_train"]:,} renders of the train captions, seed {facts["seed"]} |
| R2 on held-out captions | {facts["r2_heldout"]:.3f} ({facts["num_heldout"]:,} renders); \
on train captions {facts["r2_train"]:.3f} |
| steps, seed | {facts["steps"]}, {facts["seed"]} |
| size | {facts["bytes"]:,} bytes |
| command | `{facts["command"]}` |

What the head takes from the caption, on {leak["renders_per_caption"]} renders of each held-out caption
(`{leak["command"]}`): of the variance of its output, {share["head"]:.1%} lies between captions, against
{share["property"]:.1%} for the true property ({share["chance"]:.1%} is what chance leaves with so many renders).
Mean of the true property and of the head's output by word; the standard error of the property's mean is at most
{leak["standard_error"]:.2f}:

| | word | property | head |
|---|---|---|---|
{table(means)}

Differences in the last column beyond that error are the head's, not the property's: a change of this reward by as much can
come from another shape in the image.
"""


def llava(facts: dict) -> str:
    dev = ", ".join(
        f"{step}: {scores['greedy_hallucination']:.2f} / {scores['sampled_hallucination']:.2f}"
        for step, scores in facts["dev_by_step"].items()
    )
    heldout = facts["heldout"]
    captions = heldout["captions"] | {
        f"greedy, pipelines, {tier}": scores for tier, scores in heldout["pipeline_images"].items()
    }
    caption_table, answer_table = (
        table([[name, *(f"{value:.3f}" for value in scores.values())] for name, scores in part.items()])
        for part in (captions, heldout["answers"])
    )
    return f"""# llava-tiny

A real `LlavaForConditionalGeneration` at tiny width, trained on the mmalign synthetic world: \
{facts["parameters"]:,} parameters,
{facts["image_size_px"]} px images of {facts["image_tokens"]} tokens, {facts["num_words"]} words, \
fp16 on disk (computes in fp32), {facts["bytes"]:,} bytes in all. It knows what it
sees (greedy answers) and hallucinates when sampled, which is what preference training is there to repair.

```python
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained("assets/llava-tiny")
processor = AutoProcessor.from_pretrained("assets/llava-tiny")
question = [{{"type": "image"}}, {{"type": "text", "text": "describe the image ."}}]
text = processor.apply_chat_template([{{"role": "user", "content": question}}], add_generation_prompt=True)
inputs = processor(text=text, images=[image], return_tensors="pt")
processor.batch_decode(model.generate(**inputs, do_sample=True, top_k=0))
```

Sample with `top_k=0`: the library's default of 50 cuts half of this vocabulary. Texts are lower case; unknown words read
as `<unk>`. Images of any size are resized to {facts["image_size_px"]} px.

| | |
|---|---|
| data | fresh renders of the train split every step: captions, short questions, questions about 2 or 3 images |
| noise | from step {facts["noise_from_step"]} on, each object of a caption is wrong at \
{facts["object_noise"]:.0%}, each short answer |
| | at {facts["answer_noise"]:.0%}, and {facts["first_image_noise"]:.0%} of answers about image 2 or 3 are those of image 1 |
| vision | {facts["warmup_steps"]} steps of colour and shape per cell first, then as a side loss of weight \
{facts["vision_loss_weight"]} |
| steps, batch, seed | {facts["chosen_step"]} of {facts["total_steps"]}, {facts["batch_size"]} rows of up to 6 questions, \
{facts["seed"]} |
| command | `{facts["command"]}` |

The checkpoint was chosen on {facts["num_dev"]} dev scenes (no set of two or more objects is in two splits): sampled
hallucination nearest to {facts["target_hallucination"]} with high greedy recall, among (step: greedy / sampled hallucination)
{dev}.

Held-out scenes took no part in that choice: {facts["num_heldout"]} captions ({facts["draws"]} draws each when sampled) and \
{facts["num_heldout"]}
questions of each kind.

| captions | hallucination | hallucinating | recall | exact | mentioned |
|---|---|---|---|---|---|
{caption_table}

Hallucination: share of the mentioned objects that are absent; hallucinating: share of captions with such an object;
mentioned: objects mentioned relative to the truth. Pipelines: fresh 64 px renders as the diffusion models draw them,
one object of any size and place (attributes; single objects are not held out) and two objects in a relation.

| right answers | exists | colour | shape | count | 2 images | 3 images |
|---|---|---|---|---|---|---|
{answer_table}
"""


def llava_pairs(facts: dict) -> str:
    kinds, words = facts["pairs_by_kind"], facts["caption_words"]
    return f"""# llava-pairs

{facts["num_pairs"]} preference pairs for `llava-tiny` on the mmalign synthetic world: the true answer against an \
answer that the
model itself gave at temperature {facts["temperature"]:g}. Train scenes only. {facts["bytes"]:,} bytes.

| kind | pairs | rejected |
|---|---|---|
| caption | {kinds["caption"]} | mentions an object that is not in the image |
| exists | {kinds["exists"]} | wrong yes or no, half of each |
| colour, shape | {kinds["colour"]} + {kinds["shape"]} | wrong word |
| count | {kinds["count"]} | wrong number, a third of each truth |

`train.parquet` has the columns of TRL's vision preference format (`images`, `prompt`, `chosen`, `rejected`; the last
three as message lists) and `id`, `kind`, `truth` (the true answer as text). Captions: {words["chosen"]:.2f} words in the
chosen and {words["rejected"]:.2f} in the rejected answer on average.

| | |
|---|---|
| data | fresh renders of {facts["split"]} scenes, questions about them |
| model | `llava-tiny`, checkpoint of step {facts["model_step"]} |
| seed | {facts["seed"]} |
| command | `{facts["command"]}` |
"""


def sdxl_pairs(facts: dict) -> str:
    return f"""# sdxl-pairs

{facts["num_pairs"]:,} preference pairs for `sdxl-tiny` on the mmalign synthetic world, train captions only, \
{facts["bytes"]:,} bytes.

| side | what |
|---|---|
| rejected | drawn by the model itself in {facts["num_inference_steps"]} steps at guidance scale {facts["guidance_scale"]:g} |
| chosen | the nearest of {facts["nearest_of"]} renders of the caption (mean squared difference): the two differ in what is \
wrong and little else |

`train.parquet` has the columns `id`, `prompt`, `chosen` and `rejected` (images, \
WebP of quality {facts["webp_quality"]} on both sides).
The exact scorer prefers the chosen image of every pair; {facts["own_right"]:.0%} of the rejected ones
have all attributes right and lose on how exactly they are drawn.

| | |
|---|---|
| data | renders and own samples of the {facts["split"]} captions, attributes tier |
| model | `sdxl-tiny` |
| seed | {facts["seed"]} |
| command | `{facts["command"]}` |
"""


CARDS: dict[str, Callable[[dict], str]] = {
    "sdxl-tiny": pipeline,
    "sd15-tiny": pipeline,
    "sd3-tiny": pipeline,
    "clip-tiny": clip,
    "aesthetic-tiny": aesthetic,
    "llava-tiny": llava,
    "llava-pairs": llava_pairs,
    "sdxl-pairs": sdxl_pairs,
}


def main() -> None:
    for name in CARDS:
        folder = ASSETS_DIR / name
        write_card(folder, json.loads((folder / "card.json").read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
