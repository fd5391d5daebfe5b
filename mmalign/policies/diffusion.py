"""The policy for ε- and v-prediction denoisers on a diffusers pipeline (SD1.x, SDXL and what looks like them).

Shape legend: R requests, K draws, N = R·K network samples, C latent channels, h/w latent height and width.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mmalign import attention, randomness
from mmalign.builtin import resolve_path
from mmalign.config import DataConfig, EmaConfig, ModelConfig
from mmalign.diffusion.schedule import Schedule, squared_error
from mmalign.policies.base import PreparedImage, View
from mmalign.policies.views import ADAPTER, Views, lean_copy
from mmalign.policies.weights import weights_hash
from mmalign.types import Request, Sample, Score

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VAE_CHUNK = 8


class DiffusionPolicy:
    """A diffusers pipeline with one trained denoiser. Families set the class attributes and implement the two hooks.

    Args:
        config: the `model` section.
        data: the `data` section; only `size_ids` and `resolution` matter here.
        device: where to compute.
        seed: seeds the LoRA initialisation.
        train: False loads for inference only: no trained adapter, no fp32 masters, any adapters on top.
    """

    name = "diffusion"
    pipeline_class = "DiffusionPipeline"
    default_guidance_scale = 7.5
    default_num_steps = 50

    # -- hooks a family implements -----------------------------------------------------------------------------------

    def encode_text(self, prompts: list[str]) -> list[dict[str, Tensor]]:
        """Frozen text features, one record per prompt, on the compute device."""
        raise NotImplementedError

    def conditioning(self, contexts: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Tensor]]) -> dict:
        """Keyword arguments of the denoiser, on the device, for N records as cached (on the CPU)."""
        raise NotImplementedError

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
        self.attention = attention.select(config.attention, device, self.dtype)
        self.pipe = self._load_pipeline()
        self.pipe.set_progress_bar_config(disable=True)
        self.schedule = Schedule.from_scheduler(self.pipe.scheduler, device)
        self.scale_factor = 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)
        trained_at = int(self.pipe.unet.config.sample_size) * self.scale_factor
        self.resolution = (data.resolution if data is not None else None) or trained_at
        if self.resolution % self.scale_factor:
            raise ValueError(f"data.resolution = {self.resolution}: must be a multiple of {self.scale_factor}")
        stacked = self._load_stacked_adapters()
        self.views = Views(
            self.pipe.unet,
            lora=config.lora,
            train=train,
            stacked=stacked,
            make_reference=self._make_reference,
            seed=seed,
            untouched=("conv_in", "conv_out"),
        )
        for module in (self.pipe.vae, *self.text_encoders().values()):
            module.requires_grad_(False).eval()
        # The VAE runs in fp32 unless its config says that half precision is safe: SDXL's own overflows in fp16.
        vae_dtype = torch.float32 if self.pipe.vae.config.get("force_upcast", True) else self.dtype
        self.pipe.vae.to(device, vae_dtype)
        for module in self.text_encoders().values():
            module.to(device)
        self.pipe.unet.to(device)
        self.denoiser: nn.Module = self.pipe.unet
        attention.apply(self.pipe.unet, self.attention)
        if config.gradient_checkpointing:
            self.pipe.unet.enable_gradient_checkpointing()
        self._keys: dict[str, str] = {}

    def _load_pipeline(self) -> Any:
        import diffusers

        path = resolve_path(self.config.path)
        base = diffusers.DiffusionPipeline
        options: dict[str, Any] = {"revision": self.config.revision, "variant": self.config.variant}
        found = load_or_explain(self.config.path, lambda: base.load_config(path, revision=self.config.revision))
        found_class = found.get("_class_name", "?")
        if found_class != self.pipeline_class:
            raise ValueError(
                f"model.path {self.config.path!r} holds a {found_class}, but model.family {self.config.family!r} needs a "
                f"{self.pipeline_class}. Change one of the two"
            )
        if self.config.vae is not None:
            vae_path = resolve_path(self.config.vae)
            options["vae"] = load_or_explain(
                self.config.vae,
                lambda: diffusers.AutoencoderKL.from_pretrained(vae_path, **dtype_argument(torch.float32)),
            )
        # The denoiser is stored in the compute dtype under LoRA; full fine-tuning keeps fp32 masters (see Views).
        dtype = self.dtype if self.config.lora is not None or not self.train else torch.float32
        loader = getattr(diffusers, self.pipeline_class)
        options |= self.load_options(found)
        return load_or_explain(
            self.config.path,
            lambda: loader.from_pretrained(path, **dtype_argument(dtype), low_cpu_mem_usage=True, **options),
        )

    def load_options(self, pipeline_config: dict[str, Any]) -> dict[str, Any]:
        """More keyword arguments of `from_pretrained`."""
        return {}

    def _load_stacked_adapters(self) -> list[str]:
        names = []
        for index, path in enumerate(self.config.adapters):
            name = f"stacked_{index}"
            load_or_explain(path, lambda p=path, n=name: self.pipe.load_lora_weights(p, adapter_name=n))
            names.append(name)
        return names

    def _make_reference(self) -> nn.Module:
        from diffusers import UNet2DConditionModel

        network = UNet2DConditionModel.from_pretrained(
            resolve_path(self.config.path),
            subfolder="unet",
            revision=self.config.revision,
            variant=self.config.variant,
            **dtype_argument(torch.float32),
        )
        attention.apply(network, self.attention)
        return lean_copy(network, self.dtype).to(self.device)

    def text_encoders(self) -> dict[str, nn.Module]:
        names = ("text_encoder", "text_encoder_2")
        return {name: module for name in names if (module := getattr(self.pipe, name, None)) is not None}

    def modules(self) -> dict[str, nn.Module]:
        return {"unet": self.views.active(), "vae": self.pipe.vae, **self.text_encoders()}

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return self.views.trainable()

    def view(self, name: View) -> AbstractContextManager[None]:
        return self.views.view(name)

    def start_ema(self, config: EmaConfig) -> Any:
        return self.views.start_ema(config)

    def release_reference(self) -> None:
        self.views.release_reference()

    def reference_fingerprint(self) -> str:
        """Hash of the weights as loaded; ask before the first step."""
        return weights_hash({"unet": self.pipe.unet}, self.name)

    def autocast(self) -> AbstractContextManager[Any]:
        """The one precision context of policy and reference."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    # -- frozen encoders ---------------------------------------------------------------------------------------------

    def encode_key(self, kind: Literal["image", "prompt"]) -> str:
        """Hash of the frozen encoder's weights, dtype and settings."""
        if kind not in self._keys:
            if kind == "image":
                modules: dict[str, nn.Module] = {"vae": self.pipe.vae}
                settings = ""
            else:
                modules = self.text_encoders()
                settings = self.tokenizer_fingerprint()
            self._keys[kind] = weights_hash(modules, f"{self.name}:{kind}:{self.dtype}:{settings}")
        return self._keys[kind]

    def tokenizer_fingerprint(self) -> str:
        tokenizers = [getattr(self.pipe, name, None) for name in ("tokenizer", "tokenizer_2")]
        text = "".join(
            str(sorted(t.get_vocab().items())) + str(t.model_max_length) for t in tokenizers if t is not None
        )
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        return [{k: v.cpu() for k, v in record.items()} for record in self.encode_text(list(prompts))]

    @torch.no_grad()
    def encode_images(self, images: Sequence[PreparedImage]) -> list[dict[str, Tensor]]:
        """Posterior mean and log-variance `[C, h, w]` and the size ids `[4]` of each image.

        Images are encoded one shape at a time in chunks of 8: the VAE's activations are the largest of the pipeline.
        """
        records = []
        for start in range(0, len(images), VAE_CHUNK):
            chunk = images[start : start + VAE_CHUNK]
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
        them, and so do policy and reference.
        """
        num_draws = len(requests[0].keys)
        flat = [(request, key) for request in requests for key in request.keys]
        assert len(flat) == len(requests) * num_draws, "all requests of one call have the same number of draws"
        targets = [r.target for r, _ in flat]
        contexts = [r.context for r, _ in flat]
        t_N = torch.tensor(
            [self.schedule.timestep(randomness.stratified_uniform(k.seed, "t", k.row_id, k.draw)) for _, k in flat]
        ).to(self.device)
        shape = tuple(targets[0]["mean"].shape)
        noise = self._noise(shape, "noise", [key for _, key in flat])
        mean, logvar = self.stack(targets, "mean").float(), self.stack(targets, "logvar").float()
        latents = mean + torch.exp(0.5 * logvar) * self._noise(shape, "vae", [key for _, key in flat])
        latents = self.normalise(latents)
        noised, target = self.schedule.noised(latents, noise, t_N), self.schedule.target(latents, noise, t_N)
        network = self.denoiser if self.views.active() is self.pipe.unet else self.views.active()
        with self.autocast():
            prediction = network(noised, t_N, return_dict=False, **self.conditioning(contexts, targets))[0]
        score_RK = (-0.5 * squared_error(prediction, target)).view(len(requests), num_draws)
        return Score(score_RK.mean(1), score_RK.detach(), "surrogate")

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

    def _noise(self, shape: tuple[int, ...], purpose: str, keys: Sequence[Any]) -> Tensor:
        drawn: dict[Any, Tensor] = {}
        for key in keys:
            if key not in drawn:
                drawn[key] = randomness.normal(shape, key.seed, purpose, key.row_id, key.draw)
        return torch.stack([drawn[key] for key in keys]).to(self.device)

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
        side = self.resolution // self.scale_factor
        shape = (self.pipe.unet.config.in_channels, side, side)
        latents = torch.stack([randomness.normal(shape, s, "sample", p) for p, s in zip(prompts, seeds, strict=True)])
        generators = [randomness.generator(s, "sampler", p) for p, s in zip(prompts, seeds, strict=True)]
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
        for chunk in latents.split(VAE_CHUNK):
            decoded = vae.decode(chunk.to(vae.dtype), return_dict=False)[0].float()
            images += cast(list, self.pipe.image_processor.postprocess(decoded, output_type="pil"))
        return images

    @contextmanager
    def _pipeline_of_view(self) -> Iterator[Any]:
        trained = self.pipe.unet
        self.pipe.unet = self.views.active()
        try:
            yield self.pipe
        finally:
            self.pipe.unet = trained

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
            return
        from peft.utils import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.pipe.unet, adapter_name=ADAPTER)
        type(self.pipe).save_lora_weights(
            folder,
            unet_lora_layers={name: tensor.cpu().contiguous() for name, tensor in state.items()},
            unet_lora_adapter_metadata=self.pipe.unet.peft_config[ADAPTER].to_dict(),
        )


def dtype_argument(dtype: torch.dtype) -> dict[str, Any]:
    """The dtype keyword of `from_pretrained`: renamed in diffusers 0.42."""
    import diffusers

    major, minor = (int(part) for part in diffusers.__version__.split(".")[:2])
    return {"dtype" if (major, minor) >= (0, 42) else "torch_dtype": dtype}


def load_or_explain(path: str, load: Any) -> Any:
    """Run a hub or disk loader; turn its many failures into one line that names the path and the fix."""
    try:
        return load()
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())
        raise ValueError(
            f"cannot load {path!r}: {text[:400]}. Give a local folder, a hub id, or builtin:NAME"
        ) from error
