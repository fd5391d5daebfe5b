"""The policy for denoisers on a diffusers pipeline: ε- and v-prediction here, rectified flow in `flow.py` on top of it.

Shape legend: R requests, K draws, N = R·K network samples, C latent channels, h/w latent height and width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from mmalign import attention, randomness
from mmalign.attention import Backend
from mmalign.builtin import resolve_path
from mmalign.config import DataConfig, ModelConfig
from mmalign.diffusion.kernels import Steps, ddim_steps
from mmalign.diffusion.schedule import FlowSchedule, Schedule, squared_error
from mmalign.policies import rollouts
from mmalign.policies.base import PreparedImage
from mmalign.policies.rollouts import Replay, Trajectory, draw_noise
from mmalign.policies.views import ADAPTER, OnViews, Views, lean_copy
from mmalign.policies.weights import (
    DTYPES,
    PUT_BACK,
    load_or_explain,
    same_weights,
    stored_settings,
    tokenizer_settings,
    weights_hash,
)
from mmalign.registry import nearest
from mmalign.types import DrawKey, Request, Sample, Score

logger = logging.getLogger(__name__)

TOKENIZER_BATCH = 10_000
VAE_PIXELS = 8 * 512**2
"""Of one VAE call, whose activations are the largest of the pipeline: SDXL's in fp32 takes 8 images of 512 px, 2 of 1024."""


class DiffusionPolicy(OnViews):
    """A diffusers pipeline with one trained network. Families set the class attributes and implement the two hooks.

    Args:
        config: the `model` section.
        data: the `data` section; only `size_ids` and `resolution` matter here.
        device: where to compute.
        seed: seeds the LoRA initialisation.
        train: False loads for inference only: no trained adapter, no fp32 masters, any adapters on top.
    """

    name = "diffusion"
    modality = "image"
    pipeline_class = "DiffusionPipeline"
    network_role = "unet"
    """Which component of the pipeline is trained."""
    text_roles = ("text_encoder", "text_encoder_2", "text_encoder_3")
    auto_attention: Backend = "auto"
    """What `model.attention: auto` stands for."""
    kernels: tuple[str, ...] = ("ddim", "ode")
    """What its sampling steps can be (`mmalign.diffusion.kernels`)."""
    untouched: tuple[str, ...] = ("conv_in", "conv_out")
    """Layers that `lora.targets: all` leaves alone."""
    unread: tuple[str, ...] = (
        "model.max_sequence_length",
        "model.timestep_density",
        "model.timestep_shift",
        "data.max_length",
        "data.truncation",
        "data.image_negative",
        "data.blind",
        "evaluate.temperature",
        "evaluate.max_new_tokens",
    )
    """Config keys that mean nothing here; setting one is an error."""
    default_guidance_scale = 7.5
    default_num_steps = 50

    # -- hooks a family implements -----------------------------------------------------------------------------------

    def encode_text(self, prompts: list[str]) -> list[dict[str, Tensor]]:
        """Frozen text features, one record per prompt, on the compute device."""
        raise NotImplementedError

    def conditioning(self, contexts: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Tensor]]) -> dict:
        """Keyword arguments of the network, on the device, for N records as cached (on the CPU)."""
        raise NotImplementedError

    # -- what rectified flow overrides ---------------------------------------------------------------------------------

    def make_schedule(self) -> Schedule | FlowSchedule:
        return Schedule.from_scheduler(self.pipe.scheduler, self.device)

    def call(self, network: nn.Module, x: Tensor, time_N: Tensor, conditioning: dict[str, Any]) -> Tensor:
        return network(x, time_N, return_dict=False, **conditioning)[0]

    def sampling_options(self) -> dict[str, Any]:
        """More keyword arguments of the pipeline's call."""
        return {}

    # -- loading -----------------------------------------------------------------------------------------------------

    def __init__(
        self, config: ModelConfig, *, data: DataConfig | None, device: torch.device, seed: int, train: bool = True
    ) -> None:
        attention.quiet_xformers()
        self.config = config
        self.device = device
        self.train = train
        self.dtype = DTYPES[config.dtype]
        self.size_ids = data.size_ids if data is not None else "true"
        # Decided before anything is loaded: a request that cannot run should fail in a second, not after 7 GB.
        requested = self.auto_attention if config.attention == "auto" else config.attention
        self.attention = attention.select(requested, device, self.dtype)
        # The network is stored in the compute dtype under LoRA; full fine-tuning keeps fp32 masters (see Views). The VAE
        # is small and loses visible quality to rounding; what else is frozen is only ever computed in the compute dtype.
        network = torch.float32 if train and config.lora is None else self.dtype
        dtype: Any = {self.network_role: network, "vae": torch.float32, "default": self.dtype}
        self.pipe = self._load_pipeline({"dtype": torch.float32 if self.dtype == torch.float32 else dtype})
        self.pipe.set_progress_bar_config(disable=True)
        module: Any = getattr(self.pipe, self.network_role)
        self.module: Any = module
        self.scale_factor = 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)
        trained_at = int(module.config.sample_size) * self.scale_factor
        self.resolution = (data.resolution if data is not None else None) or trained_at
        multiple = self.scale_factor * module.config.get("patch_size", 1)  # a transformer cuts latents into patches
        if self.resolution % multiple:
            raise ValueError(f"data.resolution = {self.resolution}: must be a multiple of {multiple}")
        largest = (module.config.get("pos_embed_max_size") or self.resolution) * multiple
        if self.resolution > largest:
            raise ValueError(
                f"data.resolution = {self.resolution}: must be at most {largest}, what the model has places for"
            )
        self.schedule = self.make_schedule()
        stacked = self._load_stacked_adapters()
        self.views = Views(
            module,
            lora=config.lora,
            train=train,
            stacked=stacked,
            make_reference=self._make_reference,
            seed=seed,
            untouched=self.untouched,
        )
        for frozen in (self.pipe.vae, *self.text_encoders().values()):
            frozen.requires_grad_(False).eval()
        # The VAE runs in fp32 unless its config says that half precision is safe: SDXL's own overflows in fp16.
        vae_dtype = torch.float32 if self.pipe.vae.config.get("force_upcast", True) else self.dtype
        self.pipe.vae.to(device, vae_dtype)
        self._place_text_encoders(device)
        module.to(device)
        self.network: nn.Module = module
        attention.apply(module, self.attention)
        if config.gradient_checkpointing:
            module.enable_gradient_checkpointing()
        self._keys: dict[str, str] = {}
        self._unconditional: dict[str, Tensor] | None = None

    def _load_pipeline(self, options: dict[str, Any]) -> Any:
        """The stock pipeline, `options` being passed to its `from_pretrained`."""
        import diffusers

        path = resolve_path(self.config.path)
        base = diffusers.DiffusionPipeline
        options = {"revision": self.config.revision, "variant": self.config.variant, **options}
        found = load_or_explain(self.config.path, lambda: base.load_config(path, revision=self.config.revision))
        found_class = found.get("_class_name", "?")
        if found_class != self.pipeline_class:
            raise ValueError(
                f"model.path {self.config.path!r} holds a {found_class}, but model.family {self.config.family!r} needs a "
                f"{self.pipeline_class}. Change one of the two"
            )
        if self.config.vae is not None and "vae" not in options:
            vae_path = resolve_path(self.config.vae)
            options["vae"] = load_or_explain(
                self.config.vae,
                lambda: diffusers.AutoencoderKL.from_pretrained(vae_path, dtype=torch.float32),
            )
        loader = getattr(diffusers, self.pipeline_class)
        # A component that was saved as absent has to be passed as absent, or loading asks for it.
        absent = [name for name, entry in found.items() if isinstance(entry, (list, tuple)) and entry[0] is None]
        unknown = [name for name in self.config.without if name not in found]
        if unknown:
            parts = sorted(name for name in found if not name.startswith("_"))
            raise ValueError(
                f"model.without: {unknown[0]!r} is no component of {self.config.path!r}{nearest(unknown[0], parts)}. "
                f"Components: {', '.join(parts)}"
            )
        options |= dict.fromkeys([*absent, *self.config.without]) | self.load_options(found)
        return load_or_explain(
            self.config.path,
            lambda: loader.from_pretrained(path, low_cpu_mem_usage=True, **options),
        )

    def load_options(self, pipeline_config: dict[str, Any]) -> dict[str, Any]:
        """More keyword arguments of `from_pretrained`."""
        return {}

    def _load_stacked_adapters(self) -> list[str]:
        names = []
        for index, path in enumerate(self.config.adapters):
            name = f"stacked_{index}"
            load_or_explain(path, partial(self.pipe.load_lora_weights, path, adapter_name=name))
            names.append(name)
        if names:  # loading one makes it the only active one of a text encoder
            self.pipe.set_adapters(names)
        return names

    def _make_reference(self) -> nn.Module:
        path = resolve_path(self.config.path)
        options = {"subfolder": self.network_role, "revision": self.config.revision, "variant": self.config.variant}
        load = partial(type(self.module).from_pretrained, path, dtype=torch.float32, **options)
        network = load_or_explain(self.config.path, load, PUT_BACK)
        attention.apply(network, self.attention)
        return lean_copy(network, self.dtype).to(self.device)

    def text_encoders(self) -> dict[str, nn.Module]:
        return {name: module for name in self.text_roles if (module := getattr(self.pipe, name, None)) is not None}

    def modules(self) -> dict[str, nn.Module]:
        return {self.network_role: self.views.active(), "vae": self.pipe.vae, **self.text_encoders()}

    def reference_fingerprint(self) -> str:
        """Hash of the weights as loaded and of the settings that a score depends on; ask before the first step."""
        parts = [stored_settings(part) for part in (self.module, self.pipe.scheduler, self.pipe.vae)]
        return weights_hash({self.network_role: self.module}, f"{self.name}:{json.dumps(parts, sort_keys=True)}")

    # -- frozen encoders ---------------------------------------------------------------------------------------------

    def encode_key(self, kind: Literal["image", "prompt"]) -> str:
        """Hash of the frozen encoder's weights, dtype and settings."""
        if kind not in self._keys:
            modules: dict[str, Any] = {"vae": self.pipe.vae} if kind == "image" else self.text_encoders()
            settings: dict[str, Any] = {role: stored_settings(module) for role, module in modules.items()}
            if kind == "prompt":
                settings["tokenizers"] = self.tokenizer_fingerprint()
            salt = f"{self.name}:{kind}:{self.dtype}:{json.dumps(settings, sort_keys=True)}"
            self._keys[kind] = weights_hash(modules, salt)
        return self._keys[kind]

    def tokenizers(self) -> dict[str, Any]:
        """By text encoder."""
        found = {role: getattr(self.pipe, role.replace("text_encoder", "tokenizer"), None) for role in self.text_roles}
        return {role: tokenizer for role, tokenizer in found.items() if tokenizer is not None}

    def prompt_limits(self) -> dict[str, int]:
        """Tokens of a prompt, special ones included, that each text encoder reads."""
        tokenizers = self.tokenizers()
        return {role: tokenizers[role].model_max_length for role in self.text_encoders() if role in tokenizers}

    def cut_prompts(self, prompts: Iterable[str]) -> set[str]:
        """Those of `prompts` that no text encoder reads to the end."""
        limits = self.prompt_limits()
        cut = set(prompts) if limits else set()
        for role, limit in limits.items():
            tokenizer, texts, cut = self.tokenizers()[role], sorted(cut), set()
            for start in range(0, len(texts), TOKENIZER_BATCH):
                some = texts[start : start + TOKENIZER_BATCH]
                ids = tokenizer(some, verbose=False)["input_ids"]
                cut |= {text for text, of_text in zip(some, ids, strict=True) if len(of_text) > limit}
        return cut

    def tokenizer_fingerprint(self) -> str:
        """What decides the ids of a prompt; families add what else cuts or pads it."""
        settings = {role: tokenizer_settings(tokenizer) for role, tokenizer in self.tokenizers().items()}
        return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()

    def release_encoders(self) -> list[str]:
        """Move the text encoders to the CPU (T5-XXL alone has 4.8 billion weights); the VAE is small and stays.

        What reads a prompt brings them back, for good. The empty prompt is kept for guidance while training.
        """
        self.unconditional()
        self._place_text_encoders(torch.device("cpu"))
        return list(self.text_encoders())

    def _place_text_encoders(self, device: torch.device) -> None:
        for encoder in self.text_encoders().values():
            encoder.to(device)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        self._place_text_encoders(self.device)
        return [{k: v.cpu() for k, v in record.items()} for record in self.encode_text(list(prompts))]

    @property
    def vae_chunk(self) -> int:
        """Images of the training resolution in one VAE call, at most 8."""
        return max(1, min(8, VAE_PIXELS // self.resolution**2))

    @torch.no_grad()
    def encode_images(self, images: Sequence[PreparedImage]) -> list[dict[str, Tensor]]:
        """Posterior mean and log-variance `[C, h, w]` and the size ids `[4]` of each image.

        Images are encoded one shape at a time.
        """
        records = []
        for start in range(0, len(images), self.vae_chunk):
            chunk = images[start : start + self.vae_chunk]
            pixels = torch.stack([torch.from_numpy(np.array(image.pixels)) for image in chunk])
            pixels = pixels.permute(0, 3, 1, 2).to(self.device, self.pipe.vae.dtype) / 127.5 - 1
            posterior = self.pipe.vae.encode(pixels).latent_dist
            for index, image in enumerate(chunk):
                records.append(
                    {
                        "mean": posterior.mean[index].cpu(),
                        "logvar": posterior.logvar[index].cpu(),
                        "size": torch.tensor([*image.original_size, *image.crop_top_left], dtype=torch.float32),
                    }
                )
        return records

    # -- score -------------------------------------------------------------------------------------------------------

    def score(self, requests: Sequence[Request]) -> Score:
        """s = −½ · mean squared error of the denoiser's prediction, averaged over each request's K draws.

        x₀ is drawn from the VAE posterior; (t, ε) follow from the draw key. Chosen and rejected of a row share all of
        them, and so do policy and reference. Under guidance the unconditional prediction is the current one, held
        constant: the gradient trains the conditional branch, at the place where sampling will use it.
        """
        num_draws = len(requests[0].keys)
        flat = [(request, key) for request in requests for key in request.keys]
        assert len(flat) == len(requests) * num_draws, "all requests of one call have the same number of draws"
        targets = [r.target for r, _ in flat]
        contexts = [r.context for r, _ in flat]
        t_N = torch.tensor(
            [self.schedule.time(randomness.stratified_uniform(k.seed, "t", k.row_id, k.draw)) for _, k in flat]
        ).to(self.device)
        shape = tuple(targets[0]["mean"].shape)
        noise = self.noise(shape, "noise", [key for _, key in flat])
        mean, logvar = self.stack(targets, "mean").float(), self.stack(targets, "logvar").float()
        latents = mean + torch.exp(0.5 * logvar) * self.noise(shape, "vae", [key for _, key in flat])
        latents = self.normalise(latents)
        noised, target = self.schedule.noised(latents, noise, t_N), self.schedule.target(latents, noise, t_N)
        time_N = self.schedule.network_time(t_N)
        prediction = self.predict(noised, time_N, self.conditioning(contexts, targets))
        scale = requests[0].guidance_scale
        assert all(request.guidance_scale == scale for request in requests), (
            "all requests of one call have the same scale"
        )
        if scale != 1:
            with torch.no_grad():
                unconditional = self.conditioning([self.unconditional()] * len(flat), targets)
                negative = self.predict(noised, time_N, unconditional).float()
            prediction = negative + scale * (prediction.float() - negative)
        score_RK = (-0.5 * squared_error(prediction, target)).view(len(requests), num_draws)
        return Score(score_RK.mean(1), score_RK.detach(), "surrogate")

    def predict(self, x: Tensor, time_N: Tensor, conditioning: dict[str, Any]) -> Tensor:
        """The network's output in the current view, `[N, C, h, w]`."""
        active = self.views.active()
        network = self.network if active is self.module else active
        with self.autocast():
            return self.call(network, x, time_N, conditioning)

    def stack(self, records: Sequence[dict[str, Tensor]], name: str) -> Tensor:
        """One field of all records as a batch on the device, in one transfer."""
        return torch.stack([record[name] for record in records]).to(self.device, non_blocking=True)

    def normalise(self, latents: Tensor) -> Tensor:
        """VAE latents to the denoiser's scale."""
        vae = self.pipe.vae.config
        if vae.get("latents_mean") is not None and vae.get("latents_std") is not None:
            shape = (1, -1, 1, 1)
            mean = torch.tensor(vae.latents_mean, device=latents.device).view(shape)
            std = torch.tensor(vae.latents_std, device=latents.device).view(shape)
            return (latents - mean) * vae.scaling_factor / std
        return (latents - (vae.get("shift_factor") or 0.0)) * vae.scaling_factor

    def noise(self, shape: tuple[int, ...], purpose: str, keys: Sequence[DrawKey]) -> Tensor:
        """Standard normal noise named by `keys`, `[N, …]` on the device."""
        return draw_noise(shape, purpose, keys).to(self.device)

    # -- steps -------------------------------------------------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.resolution // self.scale_factor
        return (self.module.config.in_channels, side, side)

    def rollout_steps(self, *, kernel: str, level: float, num_steps: int, stochastic_S: Tensor | None = None) -> Steps:
        """The transitions of a rollout on the scheduler's own timesteps: `ddim` (level = η) or `ode`.

        Raises `ValueError` for a kernel of another process, and as `kernels.ddim_steps` does.
        """
        from diffusers import DDIMScheduler

        if kernel not in self.kernels:
            raise ValueError(
                f"kernel {kernel!r} does not fit {self.config.family!r}: must be {' or '.join(self.kernels)}"
            )
        scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(num_steps)
        assert isinstance(self.schedule, Schedule)
        return ddim_steps(self.schedule, scheduler.timesteps, eta=level, stochastic_S=stochastic_S)

    def rollout(self, contexts: Sequence[dict[str, Tensor]], **plan: Any) -> Trajectory:
        """Sample and record, see `rollouts.rollout`."""
        return rollouts.rollout(self, contexts, **plan)

    def replayer(self, trajectory: Trajectory) -> Callable[[int], Replay]:
        """Recorded steps under the current weights, see `rollouts.replayer`."""
        return rollouts.replayer(self, trajectory)

    def rollout_conditioning(self, contexts: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        size = torch.tensor([self.resolution, self.resolution, 0, 0], dtype=torch.float32)
        return self.conditioning(contexts, [{"size": size}] * len(contexts))

    def unconditional(self) -> dict[str, Tensor]:
        """The record that guidance starts from: the empty prompt."""
        if self._unconditional is None:
            self._unconditional = self.encode_prompts([""])[0]
        return self._unconditional

    # -- sampling ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], *, guidance_scale: float, num_steps: int
    ) -> list[Sample]:
        """One image per (prompt, seed) with the stock pipeline.

        The initial noise, and the noise of stochastic samplers, depends on (seed, prompt) alone.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed per prompt")
        shape = self.latent_shape
        latents = torch.stack([randomness.normal(shape, s, "sample", p) for p, s in zip(prompts, seeds, strict=True)])
        generators = [randomness.generator(s, "sampler", p) for p, s in zip(prompts, seeds, strict=True)]
        self._place_text_encoders(self.device)
        with self._pipeline_of_view() as pipe, self.autocast():
            latents = pipe(
                prompt=list(prompts),
                latents=latents.to(self.device),
                generator=generators,
                height=self.resolution,
                width=self.resolution,
                guidance_scale=guidance_scale,
                num_inference_steps=num_steps,
                output_type="latent",
                return_dict=False,
                **self.sampling_options(),
            )[0]
        pixels = self.decode(latents)
        return [
            Sample(prompt, image, seed, guidance_scale, num_steps)
            for prompt, seed, image in zip(prompts, seeds, pixels, strict=True)
        ]

    def decode(self, latents: Tensor) -> list[Any]:
        """Denoiser-scale latents `[N, C, h, w]` to PIL images, in the VAE's own dtype."""
        vae = self.pipe.vae
        latents = latents.float()
        if vae.config.get("latents_mean") is not None and vae.config.get("latents_std") is not None:
            shape = (1, -1, 1, 1)
            mean = torch.tensor(vae.config.latents_mean, device=latents.device).view(shape)
            std = torch.tensor(vae.config.latents_std, device=latents.device).view(shape)
            latents = latents * std / vae.config.scaling_factor + mean
        else:
            latents = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        images: list[Any] = []
        for chunk in latents.split(self.vae_chunk):
            decoded = vae.decode(chunk.to(vae.dtype), return_dict=False)[0].float()
            images += cast(list, self.pipe.image_processor.postprocess(decoded, output_type="pil"))
        return images

    @contextmanager
    def _pipeline_of_view(self) -> Iterator[Any]:
        setattr(self.pipe, self.network_role, self.views.active())
        try:
            yield self.pipe
        finally:
            setattr(self.pipe, self.network_role, self.module)

    # -- export ------------------------------------------------------------------------------------------------------

    def export(self, folder: Path) -> None:
        """The current view in the field's format.

        LoRA: `pytorch_lora_weights.safetensors` for `load_lora_weights`, in PEFT keys with the adapter's metadata (the
        conversion to the old `lora.down/up` keys loses layers). Full: a pipeline folder for `from_pretrained`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.config.lora is None:
            with self._pipeline_of_view() as pipe:
                pipe.save_pretrained(folder)
            self._unround_frozen_parts(folder)
            return
        from peft.utils import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.module, adapter_name=ADAPTER)
        layers = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
        metadata = self.module.peft_config[ADAPTER].to_dict()
        role = self.network_role
        type(self.pipe).save_lora_weights(
            folder, **{f"{role}_lora_layers": layers, f"{role}_lora_adapter_metadata": metadata}
        )

    def _unround_frozen_parts(self, folder: Path) -> None:
        """Put what is frozen into an exported pipeline as it is at `model.path`: in memory it has the compute dtype.

        One part at a time is read again. A part that is gone or says something else by now stays as it is in memory.
        """
        changed = []
        for role, part in self.pipe.components.items():
            if role == self.network_role or not isinstance(part, nn.Module):
                continue
            others = {name: other for name, other in self.pipe.components.items() if name != role}
            try:
                original = getattr(self._load_pipeline(others), role)
            except Exception as error:  # a training is over: whatever happened to its source, it must be written
                logger.debug("%s", error)
                original = None
            if original is None or not same_weights(original, part):
                changed.append(f"{role} ({part.dtype})")
                continue
            shutil.rmtree(folder / role)
            original.save_pretrained(folder / role)
        if changed:
            logger.warning(
                "frozen parts that %s no longer gives as they were loaded are exported as they are in memory: %s",
                self.config.path,
                ", ".join(changed),
            )
