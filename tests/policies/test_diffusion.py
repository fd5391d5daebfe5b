"""Score, views, adapters, precision and export of the diffusion policies, on the bundled tiny pipelines."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmalign import randomness
from mmalign.config import DataConfig, ModelConfig
from mmalign.diffusion.schedule import Schedule, squared_error
from mmalign.policies.load import load_policy
from mmalign.policies.views import ADAPTER
from mmalign.types import DrawKey, Request

CAPTION = "a large red circle on a white background"


def nudge(policy, scale: float = 0.02) -> None:
    """Move the trained weights, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator) * parameter.std().clamp(min=0.1))


# --- score ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_score_is_the_published_error_computed_by_hand(load, requests_for, family, guidance_scale):
    """s = -1/2 mean (prediction - target)^2 with t, noise and posterior sample from the draw key, by the plain formulas."""
    policy = load(family)
    (request,) = requests_for(policy, 1)
    request = replace(request, guidance_scale=guidance_scale)
    key = request.keys[0]
    shape = tuple(request.target["mean"].shape)
    posterior = randomness.normal(shape, key.seed, "vae", key.row_id, key.draw)
    latents = request.target["mean"] + torch.exp(request.target["logvar"] / 2) * posterior
    latents = (latents * policy.pipe.vae.config.scaling_factor)[None]
    noise = randomness.normal(shape, key.seed, "noise", key.row_id, key.draw)[None]
    t = int(randomness.stratified_uniform(key.seed, "t", key.row_id, key.draw) * 1000)
    scheduler = policy.pipe.scheduler
    noisy = scheduler.add_noise(latents, noise, torch.tensor([t]))
    target = scheduler.get_velocity(latents, noise, torch.tensor([t]))

    def prediction_for(context):
        inputs = {"encoder_hidden_states": context["embeds"][None]}
        if family == "sdxl":
            size = float(policy.resolution)
            inputs["added_cond_kwargs"] = {
                "text_embeds": context["pooled"][None],
                "time_ids": torch.tensor([[size, size, 0, 0, size, size]]),
            }
        return policy.pipe.unet(noisy, t, **inputs).sample

    with torch.no_grad():
        negative = prediction_for(policy.encode_prompts([""])[0])
        prediction = negative + guidance_scale * (prediction_for(request.context) - negative)
        score = policy.score([request]).value_R
    assert score.item() == pytest.approx(-0.5 * (prediction - target).square().mean().item(), rel=1e-5)


def test_the_unconditional_prediction_is_held_under_guidance(load, requests_for):
    """On the empty prompt both branches agree: the guided score is the plain one. Its gradient is that of the conditional
    branch, `guidance_scale` times the plain one; with both branches trained it would be the plain one."""
    policy = load("sdxl")
    empty = [replace(request, context=policy.unconditional()) for request in requests_for(policy, 2)]
    weights = [parameter for _, parameter in policy.trainable()]
    plain, guided = (
        policy.score([replace(request, guidance_scale=scale) for request in empty]).value_R for scale in (1.0, 3.0)
    )
    assert torch.allclose(plain, guided, rtol=1e-6)
    once, thrice = (torch.autograd.grad(value_R.sum(), weights) for value_R in (plain, guided))
    scale = max(float(gradient.abs().max()) for gradient in once)
    assert all(torch.allclose(3 * a, b, atol=1e-5 * scale) for a, b in zip(once, thrice, strict=True))


def test_epsilon_prediction_is_read_from_the_scheduler_config(tmp_path: Path):
    """The same pipeline declared as an ε-model: the target is the noise itself."""
    import shutil

    folder = tmp_path / "epsilon"
    shutil.copytree(policy_path("sdxl"), folder)
    file = folder / "scheduler" / "scheduler_config.json"
    declared = {**json.loads(file.read_text()), "prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    file.write_text(json.dumps(declared))
    policy = load_policy(ModelConfig(family="sdxl", path=str(folder)), device="cpu")
    assert policy.schedule.prediction_type == "epsilon"
    side = policy.resolution // policy.scale_factor
    target = {"mean": torch.zeros(4, side, side), "logvar": torch.full((4, side, side), -30.0), "size": torch.zeros(4)}
    key = DrawKey(0, "row", 0)
    with torch.no_grad():
        score = policy.score([Request(policy.encode_prompts([CAPTION])[0], target, [key])]).value_R
        noise = randomness.normal((4, side, side), 0, "noise", "row", 0)[None]
        t = int(randomness.stratified_uniform(0, "t", "row", 0) * 1000)
        noisy = policy.schedule.sigma_T[t] * noise
        inputs = policy.conditioning([policy.encode_prompts([CAPTION])[0]], [target])
        prediction = policy.pipe.unet(noisy, t, **inputs).sample
    assert score.item() == pytest.approx(-0.5 * (prediction - noise).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_batch_equals_stacked_singles_on_scores_and_gradients(load, requests_for, lora):
    policy = load(lora=lora)
    if lora:
        nudge(policy)
    requests = requests_for(policy, 4)
    together = policy.score(requests).value_R
    together.mean().backward()
    gradients = {name: p.grad.clone() for name, p in policy.trainable()}
    for _, parameter in policy.trainable():
        parameter.grad = None
    singles = [policy.score([request]).value_R for request in requests]
    for single in singles:
        (single.sum() / 4).backward()
    torch.testing.assert_close(torch.cat(singles), together, rtol=1e-5, atol=1e-7)
    scale = max(g.abs().max() for g in gradients.values())
    for name, parameter in policy.trainable():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=float(1e-5 * scale))


def test_draws_are_averaged_inside_the_score(load, requests_for):
    policy = load()
    (request,) = requests_for(policy, 1, num_draws=3)
    with torch.no_grad():
        score = policy.score([request])
        singles = [policy.score([Request(request.context, request.target, [key])]).value_R for key in request.keys]
    torch.testing.assert_close(score.value_R[0], torch.cat(singles).mean(), rtol=1e-5, atol=0)
    assert score.per_draw_RK.shape == (1, 3)
    assert len(set(score.per_draw_RK[0].tolist())) == 3


def test_randomness_belongs_to_the_row_not_to_its_place(load, requests_for):
    policy = load()
    requests = requests_for(policy, 4)
    with torch.no_grad():
        forward, backward = policy.score(requests).value_R, policy.score(requests[::-1]).value_R
    torch.testing.assert_close(forward, backward.flip(0), rtol=1e-5, atol=0)


def test_t_is_stratified_over_a_rows_draws():
    values = [randomness.stratified_uniform(0, "t", "row", draw) for draw in range(64)]
    gaps = torch.tensor(sorted(values)).diff()
    assert gaps.max() < 3 / 64
    first = [randomness.stratified_uniform(0, "t", f"row-{i}", 0) for i in range(2000)]
    assert torch.tensor(first).mean().item() == pytest.approx(0.5, abs=0.03)


def test_size_conditioning_reaches_sdxl_and_can_be_switched_off():
    def scored(size_ids: str, original: tuple[int, int]) -> float:
        config = ModelConfig(family="sdxl", path="builtin:sdxl-tiny")
        policy = load_policy(config, data=DataConfig(path="x", size_ids=size_ids), device="cpu")
        context = policy.encode_prompts([CAPTION])[0]
        side = policy.resolution // policy.scale_factor
        target = {
            "mean": torch.zeros(4, side, side),
            "logvar": torch.full((4, side, side), -9.0),
            "size": torch.tensor([*original, 0, 0], dtype=torch.float32),
        }
        with torch.no_grad():
            return policy.score([Request(context, target, [DrawKey(0, "r", 0)])]).value_R.item()

    assert scored("true", (64, 64)) != scored("true", (512, 300))
    assert scored("target", (64, 64)) == scored("target", (512, 300)) == scored("true", (64, 64))


# --- schedule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_schedule_agrees_with_diffusers(prediction_type, zero_snr):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(
        prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr, beta_schedule="scaled_linear"
    )
    schedule = Schedule.from_scheduler(scheduler)
    x0, noise = torch.randn(2, 5, 4, 8, 8)
    t = torch.tensor([0, 1, 500, 998, 999])
    torch.testing.assert_close(schedule.noised(x0, noise, t), scheduler.add_noise(x0, noise, t), rtol=1e-4, atol=1e-5)
    target = {"epsilon": noise, "sample": x0, "v_prediction": scheduler.get_velocity(x0, noise, t)}[prediction_type]
    torch.testing.assert_close(schedule.target(x0, noise, t), target, rtol=1e-4, atol=1e-5)
    assert (schedule.alpha_T[-1] == 0) == zero_snr


def test_epsilon_error_is_alpha_squared_times_v_error():
    from diffusers import DDPMScheduler

    schedule = Schedule.from_scheduler(DDPMScheduler(prediction_type="v_prediction"))
    x0, noise, guess = torch.randn(3, 6, 4, 8, 8)
    t = torch.tensor([0, 100, 300, 500, 700, 900])
    alpha, sigma = schedule.alpha_T[t].view(-1, 1, 1, 1), schedule.sigma_T[t].view(-1, 1, 1, 1)
    noisy = schedule.noised(x0, noise, t)
    epsilon_of_guess = alpha * guess + sigma * noisy
    v_error = squared_error(guess, schedule.target(x0, noise, t))
    torch.testing.assert_close(
        squared_error(epsilon_of_guess, noise), alpha.flatten() ** 2 * v_error, rtol=1e-3, atol=1e-6
    )


def test_video_errors_reduce_to_one_number_per_sample():
    assert squared_error(torch.zeros(2, 4, 5, 8, 8), torch.ones(2, 4, 5, 8, 8)).tolist() == [1.0, 1.0]


# --- views ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_reference_equals_policy_bit_by_bit_before_training_and_stays(load, requests_for, family, lora, dtype):
    policy = load(family, lora=lora, dtype=dtype)
    requests = requests_for(policy)
    with torch.no_grad():
        before = policy.score(requests).value_R
        with policy.view("reference"):
            assert torch.equal(policy.score(requests).value_R, before)
        nudge(policy)
        after = policy.score(requests).value_R
        with policy.view("reference"):
            assert torch.equal(policy.score(requests).value_R, before)
        assert torch.equal(policy.score(requests).value_R, after)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("lora", [False, True])
def test_view_returns_after_an_error_and_gradients_still_flow(load, requests_for, lora):
    policy = load(lora=lora)
    with pytest.raises(RuntimeError, match="inside"), policy.view("reference"):
        raise RuntimeError("inside")
    assert all(parameter.requires_grad for _, parameter in policy.trainable())
    policy.score(requests_for(policy, 2)).value_R.sum().backward()
    assert all(parameter.grad is not None for _, parameter in policy.trainable())


@pytest.mark.parametrize("reference_first", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_lora_gradients_with_checkpointing_and_in_either_order(load, requests_for, checkpointing, reference_first):
    """Forgetting to switch the adapter back before backward gives no gradients at all, silently, in published scripts."""
    policy = load(lora=True, gradient_checkpointing=checkpointing)
    nudge(policy)
    requests = requests_for(policy, 2)

    def reference() -> None:
        with torch.no_grad(), policy.view("reference"):
            policy.score(requests)

    if reference_first:
        reference()
    score = policy.score(requests).value_R
    if not reference_first:
        reference()
    score.sum().backward()
    gradients = [parameter.grad for _, parameter in policy.trainable()]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_checkpointing_changes_no_gradient(load, requests_for):
    gradients = []
    for checkpointing in (False, True):
        policy = load(lora=True, gradient_checkpointing=checkpointing)
        policy.score(requests_for(policy, 2)).value_R.sum().backward()
        gradients.append([parameter.grad for _, parameter in policy.trainable()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-6, atol=1e-8)


def test_ema_view_computes_with_the_average_and_restores(load):
    from mmalign.config import EmaConfig

    policy = load(lora=True)
    ema = policy.start_ema(EmaConfig(decay=0.5))
    parameters = [parameter for _, parameter in policy.trainable()]
    start = [parameter.clone() for parameter in parameters]
    nudge(policy)
    moved = [parameter.clone() for parameter in parameters]
    ema.step(parameters)
    with policy.view("ema"):
        seen = [parameter.clone() for parameter in parameters]
    assert all(torch.equal(a, b) for a, b in zip(parameters, moved, strict=True))
    weight = ema.cur_decay_value
    for first, last, average in zip(start, moved, seen, strict=True):
        torch.testing.assert_close(average, weight * first + (1 - weight) * last)


def test_views_do_not_nest_and_unknown_names_are_errors(load):
    policy = load(lora=True)
    with policy.view("reference"), pytest.raises(ValueError, match="leave the outer view"), policy.view("ema"):
        pass
    with pytest.raises(ValueError, match="no moving average is kept"), policy.view("ema"):
        pass


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_are_fp32_on_a_bf16_base(load):
    policy = load(lora=True, dtype="bf16")
    assert {parameter.dtype for _, parameter in policy.trainable()} == {torch.float32}
    assert policy.pipe.unet.conv_in.weight.dtype == torch.bfloat16


def test_targets_all_reaches_every_linear_and_conv_but_the_ends(load):
    policy = load(lora=True)
    layers = {name.split(".lora_")[0] for name, _ in policy.trainable()}
    base = {
        name.removesuffix(".base_layer")
        for name, module in policy.pipe.unet.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and ".lora_" not in name
    }
    assert layers == base - {"conv_in", "conv_out"}


def test_unknown_targets_are_an_error_that_names_them(load):
    with pytest.raises(ValueError, match="to_nowhere"):
        load(lora={"rank": 2, "targets": ["to_nowhere"]})


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_lora_result_loads_in_stock_diffusers_whole_and_bit_exact(load, tmp_path: Path, family):
    import diffusers

    policy = load(family, lora={"rank": 4, "alpha": 8, "targets": "all"})
    base_image = policy.sample([CAPTION], [0], guidance_scale=3.0, num_steps=4)[0].image
    nudge(policy, 0.1)
    policy.export(tmp_path)
    weights = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(weights, "pt") as file:
        saved = set(file.keys())
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert any("lora_alpha" in key for key in metadata)

    stock = getattr(diffusers, policy.pipeline_class).from_pretrained(policy_path(family), dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(tmp_path)
    loaded = [name for name, _ in stock.unet.named_parameters() if ".lora_" in name]
    assert len(loaded) == len(saved) == len(policy.trainable())
    name = loaded[0].split(".lora_")[0]
    assert stock.unet.get_submodule(name).scaling == {"default_0": 2.0}

    tuned_image = policy.sample([CAPTION], [0], guidance_scale=3.0, num_steps=4)[0].image
    assert render(stock, policy) == tuned_image.tobytes() != base_image.tobytes()
    stock.disable_lora()
    assert render(stock, policy) == base_image.tobytes()


def test_full_result_loads_in_stock_diffusers_and_renders_the_same(load, tmp_path: Path):
    from diffusers import StableDiffusionXLPipeline

    policy = load()
    base_image = policy.sample([CAPTION], [0], guidance_scale=3.0, num_steps=4)[0].image
    nudge(policy)
    tuned_image = policy.sample([CAPTION], [0], guidance_scale=3.0, num_steps=4)[0].image
    policy.export(tmp_path)
    stock = StableDiffusionXLPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    assert render(stock, policy) == tuned_image.tobytes() != base_image.tobytes()


def test_a_full_export_keeps_frozen_parts_as_they_were_loaded(tmp_path: Path):
    """fp16 on disk, trained in bf16: text encoders and VAE are not rounded on the way through."""
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(policy_path("sdxl"))
    pipe.vae.register_to_config(force_upcast=False)  # so that it is computed in bf16 as well
    pipe.to(torch.float16).save_pretrained(tmp_path / "half")
    policy = load_policy(ModelConfig(family="sdxl", path=str(tmp_path / "half"), dtype="bf16"), device="cpu")
    nudge(policy)
    policy.export(tmp_path / "full")
    before, after = (StableDiffusionXLPipeline.from_pretrained(tmp_path / name) for name in ("half", "full"))
    for role in ("vae", "text_encoder", "text_encoder_2", "unet"):
        first, second = (getattr(pipe, role).state_dict() for pipe in (before, after))
        assert all(first[name].dtype == second[name].dtype for name in first)
        assert all(torch.equal(first[name], second[name]) for name in first) == (role != "unet")


@pytest.mark.parametrize("what", ["gone", "changed"])
def test_a_full_export_needs_nothing_of_its_source(tmp_path: Path, caplog, what):
    """Training took days, and the folder it started from was moved, or one encoder in it replaced."""
    from diffusers import StableDiffusionXLPipeline

    source, full = tmp_path / "source", tmp_path / "full"
    shutil.copytree(policy_path("sdxl"), source)
    policy = load_policy(ModelConfig(family="sdxl", path=str(source), dtype="bf16"), device="cpu")
    file = source / "text_encoder" / "model.safetensors"
    expected = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    if what == "gone":
        source.rename(tmp_path / "moved")
    else:
        changed = {name: tensor + 1 if "weight" in name else tensor for name, tensor in load_file(file).items()}
        save_file(changed, file, metadata={"format": "pt"})
    policy.export(full)
    (record,) = [record for record in caplog.records if record.name.startswith("mmalign")]
    assert str(source) in record.message
    assert "text_encoder (torch.bfloat16)" in record.message
    assert ("text_encoder_2" in record.message) == (what == "gone")
    assert all(torch.equal(load_file(full / file.relative_to(source))[name], expected[name]) for name in expected)
    StableDiffusionXLPipeline.from_pretrained(full)


def test_frozen_stacked_adapter_stays_frozen_and_belongs_to_the_reference(load, requests_for, tmp_path: Path):
    first = load(lora=True)
    nudge(first, 0.1)
    first.export(tmp_path)
    requests = requests_for(first)
    with torch.no_grad():
        with_first = first.score(requests).value_R
        with first.view("reference"):
            bare = first.score(requests).value_R
    second = load(lora=True, adapters=[str(tmp_path)])
    stacked = {name: p.clone() for name, p in second.pipe.unet.named_parameters() if ".stacked_0." in name}
    assert stacked
    with torch.no_grad(), second.view("reference"):
        torch.testing.assert_close(second.score(requests).value_R, with_first, rtol=1e-5, atol=0)
    optimizer = torch.optim.SGD([p for _, p in second.trainable()], lr=1e-2)
    for _ in range(2):
        with torch.no_grad(), second.view("reference"):
            second.score(requests)
        second.score(requests).value_R.sum().backward()
        optimizer.step()
    for name, parameter in second.pipe.unet.named_parameters():
        if ".stacked_0." in name:
            assert not parameter.requires_grad
            assert parameter.grad is None
            assert torch.equal(parameter, stacked[name])
    assert {name.split(".")[-2] for name, _ in second.trainable()} == {ADAPTER}
    assert not torch.allclose(with_first, bare, rtol=1e-4)


def test_text_parts_of_all_stacked_adapters_are_active(load, tmp_path: Path):
    from diffusers import StableDiffusionXLPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    def stock(adapters: int) -> torch.Tensor:
        pipe = StableDiffusionXLPipeline.from_pretrained(policy_path("sdxl"))
        names = [f"adapter_{index}" for index in range(adapters)]
        for index, name in enumerate(names):
            pipe.load_lora_weights(tmp_path / str(index), adapter_name=name)
        if names:
            pipe.set_adapters(names)
        return pipe.encode_prompt(CAPTION, do_classifier_free_guidance=False)[0][0]

    for index in range(2):
        pipe = StableDiffusionXLPipeline.from_pretrained(policy_path("sdxl"))
        for role, targets in (("unet", ["to_q"]), ("text_encoder", ["q_proj", "v_proj"])):
            adapter = LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
            getattr(pipe, role).add_adapter(adapter)
        layers = {
            f"{role}_lora_layers": get_peft_model_state_dict(getattr(pipe, role)) for role in ("unet", "text_encoder")
        }
        pipe.save_lora_weights(tmp_path / str(index), **layers)
    expected = [stock(adapters) for adapters in range(3)]
    for adapters in range(3):
        policy = load(train=False, adapters=[str(tmp_path / str(index)) for index in range(adapters)])
        torch.testing.assert_close(
            policy.encode_prompts([CAPTION])[0]["embeds"], expected[adapters], rtol=1e-5, atol=1e-5
        )
    assert (expected[2] - expected[1]).abs().max() > 1e-2
    assert (expected[1] - expected[0]).abs().max() > 1e-2


def test_stacked_adapter_with_full_fine_tuning_is_refused(load, tmp_path: Path):
    policy = load(lora=True)
    policy.export(tmp_path)
    with pytest.raises(ValueError, match=r"model\.adapters needs model\.lora"):
        load(adapters=[str(tmp_path)])


def policy_path(family: str) -> Path:
    from mmalign.builtin import builtin_path

    return builtin_path({"sdxl": "builtin:sdxl-tiny", "sd15": "builtin:sd15-tiny"}[family])


def render(pipe, policy) -> bytes:
    """The image a user of stock diffusers gets from the same initial noise."""
    side = policy.resolution // policy.scale_factor
    latents = randomness.normal((4, side, side), 0, "sample", CAPTION)[None]
    size = policy.resolution
    image = pipe(
        prompt=CAPTION, latents=latents, height=size, width=size, guidance_scale=3.0, num_inference_steps=4
    ).images[0]
    return image.tobytes()


# --- loading and sampling ---------------------------------------------------------------------------------------------


def test_sampling_noise_depends_on_prompt_and_seed_alone(load):
    policy = load()
    prompts = [CAPTION, "a small blue square on a black background", CAPTION]
    together = policy.sample(prompts, [0, 0, 1], guidance_scale=3.0, num_steps=3)
    alone = policy.sample([CAPTION], [1], guidance_scale=3.0, num_steps=3)
    difference = abs(pixels(together[2].image) - pixels(alone[0].image)).max()
    assert difference <= 1  # another batch shape rounds differently
    assert abs(pixels(together[0].image) - pixels(together[2].image)).max() > 8


def pixels(image) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image)).int()


@pytest.mark.parametrize(("resolution", "calls"), [(64, [4]), (768, [3, 1])])
def test_the_vae_takes_as_many_images_at_once_as_their_size_allows(requests_for, resolution, calls):
    data = DataConfig(path="unused", resolution=resolution)
    model = ModelConfig(family="sdxl", path="builtin:sdxl-tiny")
    policy = load_policy(model, data=data, device="cpu", train=False)
    seen = []
    for part in (policy.pipe.vae.encoder, policy.pipe.vae.decoder):
        part.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    requests = requests_for(policy, 4)
    with torch.no_grad():
        images = policy.decode(torch.stack([policy.normalise(request.target["mean"]) for request in requests]))
    assert len(images) == len(requests) == 4
    assert seen == calls * 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"family": "sd15", "path": "builtin:sdxl-tiny"}, "holds a StableDiffusionXLPipeline"),
        ({"family": "sdxl", "path": "builtin:sdxl-tinny"}, "did you mean 'sdxl-tiny'"),
        ({"family": "sdxl", "path": "nobody/nothing"}, "cannot load 'nobody/nothing'"),
        ({"family": "sdxl", "path": "builtin:sdxl-tiny", "attention": "xformers"}, "'xformers' cannot run on cpu"),
        ({"family": "sdxl", "path": "builtin:sdxl-tiny", "attention": "flash"}, "'flash' cannot run on cpu"),
    ],
)
def test_what_cannot_be_loaded_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        load_policy(ModelConfig(**config), device="cpu")


def test_auto_attention_on_cpu_is_sdpa(load):
    assert load(attention="auto").attention == "sdpa"


@pytest.mark.parametrize("own", [True, False], ids=["pipeline's", "model.vae"])
@pytest.mark.parametrize("upcast", [True, False, None])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_vae_runs_in_half_precision_only_where_its_config_allows_it(
    requests_for, tmp_path: Path, dtype: str, upcast: bool | None, own: bool
):
    """`force_upcast: false` alone allows it. `model.vae` replaces the pipeline's VAE, which says the opposite."""
    pipeline, vae = tmp_path / "pipeline", tmp_path / "vae"
    shutil.copytree(policy_path("sdxl"), pipeline)
    shutil.copytree(pipeline / "vae", vae)
    for folder, says in ((pipeline / "vae", upcast if own else not upcast), (vae, upcast)):
        config = json.loads((folder / "config.json").read_text()) | {"force_upcast": says}
        if says is None:
            del config["force_upcast"]
        (folder / "config.json").write_text(json.dumps(config))
    weights = {name: 2 * tensor for name, tensor in load_file(vae / "diffusion_pytorch_model.safetensors").items()}
    if not own:
        save_file(weights, vae / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    model = ModelConfig(family="sdxl", path=str(pipeline), dtype=dtype, vae=None if own else str(vae))
    policy = load_policy(model, device="cpu", train=False)
    expected = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype] if upcast is False else torch.float32
    seen = []
    for part in (policy.pipe.vae.encoder, policy.pipe.vae.decoder):
        part.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    (request,) = requests_for(policy, 1)
    policy.decode(policy.normalise(request.target["mean"])[None])
    assert seen == [(expected, expected)] * 2
    name, stored = next(iter(weights.items()))
    assert torch.equal(policy.pipe.vae.state_dict()[name], (stored / 2 if own else stored).to(expected))
