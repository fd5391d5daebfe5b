"""The policy for image-text-to-text language models on transformers: exact log-likelihoods of text responses.

A score request is packed into a row that shares its prompt and images with other responses (`token_rows`), runs through
projector and language model (`token_network`), and comes back as summed nats. The vision tower is frozen: its features are
encoded once and cached; the projector runs inside `score`, because full fine-tuning trains it.

Shape legend: R requests, T response tokens, M response tokens of all requests, D feature width.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmalign.config import DataConfig, ModelConfig
from mmalign.policies.token_answers import generate
from mmalign.policies.token_load import (
    load_adapters,
    load_model,
    load_processor,
    save_adapter,
    select_attention,
    why_not_shared,
)
from mmalign.policies.token_network import Parts, TokenNetwork
from mmalign.policies.token_rows import TokenContext, TokenTarget, pack
from mmalign.policies.token_text import ChatText
from mmalign.policies.views import ADAPTER, OnViews, Views, lean_copy
from mmalign.policies.weights import DTYPES, PUT_BACK, stored_settings, weights_hash
from mmalign.types import Answer, ImageRef, Request, Row, Score, Side

__all__ = ["TokenContext", "TokenPolicy", "TokenTarget"]

logger = logging.getLogger(__name__)

VISION_CHUNK = 8
PROBE_SIZES = ((96, 384), (384, 96), (640, 640))


class TokenPolicy(OnViews):
    """An image-text-to-text model. Families set the class attributes and implement the hooks.

    Args:
        config: the `model` section.
        data: the `data` section; only `max_length` and `truncation` matter here.
        device: where to compute.
        seed: seeds the LoRA initialisation.
        train: False loads for inference only: no trained adapter, no fp32 masters, any adapters on top.

    Setting `share_prefix` to False scores each request in a row of its own (a model that takes no mask of ours must).
    """

    name = "tokens"
    modality = "text"
    model_type = ""
    """`model_type` in the checkpoint's config.json."""
    vision_role = "model.vision_tower"
    projector_role = "model.multi_modal_projector"
    language_role = "model.language_model"
    head_role = "lm_head"
    attention_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Layers of the language model that `lora.targets: attention` adapts; `all` adapts each of its linear layers."""
    unread: tuple[str, ...] = (
        "model.vae",
        "model.without",
        "model.max_sequence_length",
        "model.timestep_density",
        "model.timestep_shift",
        "data.resolution",
        "data.crop",
        "data.num_crops",
        "data.flip",
        "data.size_ids",
        "data.prompt_dropout",
        "method.guidance_scale",
        "train.num_draws",
        "evaluate.guidance_scale",
        "evaluate.num_steps",
    )
    """Config keys that mean nothing here; setting one is an error."""

    # -- hooks a family implements -----------------------------------------------------------------------------------

    def prepare_image(self, image: Any) -> dict[str, Tensor]:
        """What the vision tower takes for one PIL image, from the stock image processor."""
        return dict(self.processor.image_processor(images=[image], return_tensors="pt"))

    def count_image_tokens(self, prepared: dict[str, Tensor]) -> int:
        """Placeholders of one prepared image."""
        raise NotImplementedError

    def vision_features(self, prepared: Sequence[dict[str, Tensor]]) -> list[Tensor]:
        """Frozen features `[T_i, D]` of images of one size, before the projector."""
        raise NotImplementedError

    def image_fingerprint(self) -> str:
        """What decides the features of an image, beside the vision tower's weights."""
        return str(self.processor.image_processor.to_json_string())

    def prompt_positions(self, context: TokenContext) -> Tensor:
        """Positions `[A, P]` of a prompt on the model's A position axes."""
        return torch.arange(len(context.ids))[None]

    # -- loading -----------------------------------------------------------------------------------------------------

    def __init__(
        self, config: ModelConfig, *, data: DataConfig | None, device: torch.device, seed: int, train: bool = True
    ) -> None:
        self.config = config
        self.device = device
        self.train = train
        self.dtype = DTYPES[config.dtype]
        # Decided before anything is loaded: a request that cannot run should fail in a second, not after 14 GB.
        self.attention = select_attention(config.attention, device, self.dtype)
        self.processor = load_processor(config, self.model_type)
        # The base is stored in the compute dtype under LoRA; full fine-tuning keeps fp32 masters (see Views), and with
        # them the vision tower, which is computed under autocast and exported as it was loaded.
        full = train and config.lora is None
        self.model = load_model(config, torch.float32 if full else self.dtype, self.attention)
        self.model_config = self.model.config
        self.image_token_id = int(self.model_config.image_token_id)
        self.views = Views(
            self.model,
            lora=config.lora,
            train=train,
            stacked=load_adapters(self.model, config.adapters),
            make_reference=self._make_reference,
            seed=seed,
            untouched=(self.projector_role, self.head_role),
            attention_targets=self.attention_targets,
            frozen=(self.vision_role,),
        )
        self.model.to(device)
        self._core = TokenNetwork(
            self.model, self.parts(self.model), gradient_checkpointing=config.gradient_checkpointing and train
        )
        self.network: nn.Module = self._core
        self.num_image_tokens = functools.lru_cache(maxsize=4096)(self._num_image_tokens)
        self.text = self._make_text(data)
        reason = why_not_shared(self.model_config.get_text_config(), self.attention, self.text.max_length)
        self.share_prefix = reason is None
        if reason is not None:
            logger.warning("responses do not share their prompt, each is scored in a row of its own: %s", reason)
        self._keys: dict[str, str] = {}

    def _make_reference(self) -> nn.Module:
        base = load_model(self.config, torch.float32, self.attention, PUT_BACK)
        model = lean_copy(base, self.dtype).to(self.device)
        parent, _, leaf = self.vision_role.rpartition(".")
        setattr(model.get_submodule(parent), leaf, self.parts(self.model).vision)
        return model

    def _make_text(self, data: DataConfig | None) -> ChatText:
        limit = int(self.model_config.get_text_config().max_position_embeddings)
        max_length = (data.max_length if data is not None else None) or limit
        if max_length > limit:
            raise ValueError(f"data.max_length = {max_length}: the model has {limit} positions; lower it")
        counts = {self.num_image_tokens(size) for size in PROBE_SIZES}
        return ChatText(
            self.processor,
            image_token_id=self.image_token_id,
            num_image_tokens=counts.pop() if len(counts) == 1 else self.num_image_tokens,
            max_length=max_length,
            truncate=data is not None and data.truncation == "response",
        )

    def parts(self, model: Any) -> Parts:
        return Parts(
            vision=model.get_submodule(self.vision_role),
            projector=model.get_submodule(self.projector_role),
            language=model.get_submodule(self.language_role),
            embedding=model.get_input_embeddings(),
            head=model.get_submodule(self.head_role),
        )

    def modules(self) -> dict[str, nn.Module]:
        parts = self.parts(self.views.active())
        return {
            "language_model": parts.language,
            "lm_head": parts.head,
            "projector": parts.projector,
            "vision_tower": parts.vision,
        }

    def reference_fingerprint(self) -> str:
        """Hash of the weights as loaded and of the model's settings; ask before the first step."""
        settings = json.dumps(stored_settings(self.model), sort_keys=True)
        return weights_hash({"model": self.model}, f"{self.name}:{settings}")

    # -- text and images ---------------------------------------------------------------------------------------------

    @property
    def truncated(self) -> set[str]:
        """Ids of rows that were cut to `data.max_length`."""
        return self.text.truncated

    def tokenize(self, row: Row, side: Side) -> tuple[Tensor, Tensor]:
        """Prompt ids `[P]`, image placeholders repeated, and response ids `[T]`. Raises `DataError` naming the row."""
        return self.text.tokenize(row, side)

    def _num_image_tokens(self, size_hw: tuple[int, int]) -> int:
        """Image tokens of an image of (height, width), by the stock image processor's own arithmetic."""
        from PIL import Image

        return self.count_image_tokens(self.prepare_image(Image.new("RGB", (size_hw[1], size_hw[0]))))

    def encode_key(self, kind: Literal["image", "prompt"]) -> str:
        """Hash of the frozen encoder's weights, dtype and settings; for prompts, of tokenizer and template."""
        if kind not in self._keys:
            if kind == "image":
                vision = self.parts(self.model).vision
                modules = {"vision": vision}
                settings = f"{self.image_fingerprint()}:{json.dumps(stored_settings(vision), sort_keys=True)}"
            else:
                modules, settings = {}, self.text.fingerprint()
            self._keys[kind] = weights_hash(modules, f"{self.name}:{kind}:{self.dtype}:{settings}")
        return self._keys[kind]

    def release_encoders(self) -> list[str]:
        """None: the vision tower is a part of `network`, which for several processes must lie on one device."""
        return []

    @torch.no_grad()
    def encode_images(self, images: Sequence[Any]) -> list[dict[str, Tensor]]:
        """`features` `[T, D]` of each PIL image, from the frozen vision tower, before the projector."""
        prepared = [self.prepare_image(image.convert("RGB")) for image in images]
        groups: dict[Any, list[int]] = {}
        for index, inputs in enumerate(prepared):
            groups.setdefault(tuple(sorted((k, tuple(v.shape)) for k, v in inputs.items())), []).append(index)
        found: dict[int, Tensor] = {}
        with self.autocast():
            for indices in groups.values():
                for start in range(0, len(indices), VISION_CHUNK):
                    chunk = indices[start : start + VISION_CHUNK]
                    features = self.vision_features([prepared[index] for index in chunk])
                    found.update(zip(chunk, features, strict=True))
        for index, inputs in enumerate(prepared):
            if len(found[index]) != self.count_image_tokens(inputs):
                raise ValueError(
                    f"the vision tower gives {len(found[index])} features where the processor announces "
                    f"{self.count_image_tokens(inputs)} image tokens: processor_config.json and config.json of "
                    f"{self.config.path!r} disagree (patch_size, num_additional_image_tokens, "
                    f"vision_feature_select_strategy)"
                )
        return [{"features": found[index].to("cpu", self.dtype)} for index in range(len(images))]

    # -- score -------------------------------------------------------------------------------------------------------

    def score(self, requests: Sequence[Request]) -> Score:
        """Σ log p(token) of each response in nats; draws do not matter, the score is exact."""
        contexts = [request.context for request in requests]
        targets = [request.target for request in requests]
        rows = pack(
            contexts,
            targets,
            image_token_id=self.image_token_id,
            pad_token_id=self._pad_token_id(),
            share=self.share_prefix,
            positions=self.prompt_positions,
            multiple=8 if self.device.type == "cuda" else 1,
        ).to(self.device)
        features = {name: feature for c in contexts for name, feature in zip(c.image_ids, c.features, strict=True)}
        network = self.network if self.views.active() is self.model else self._network_of_view()
        with self.autocast():
            logp_M = network(rows, [features[name].to(self.device, non_blocking=True) for name in rows.image_ids])
        num_tokens_R = torch.tensor([len(target.ids) for target in targets])
        logp_RT = logp_M.new_zeros(len(requests), int(num_tokens_R.max()))
        value_R = logp_RT.index_put((rows.request_M, rows.step_M), logp_M).sum(1)
        return Score(value_R, value_R.detach()[:, None], "exact", num_tokens_R.to(self.device))

    def _network_of_view(self) -> TokenNetwork:
        model = self.views.active()
        return (
            self._core if model is self.model else TokenNetwork(model, self.parts(model), gradient_checkpointing=False)
        )

    def _pad_token_id(self) -> int:
        tokenizer = self.processor.tokenizer
        return int(next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0))

    # -- answers -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def answer(
        self,
        rows: Sequence[Row],
        seeds: Sequence[int],
        *,
        temperature: float,
        max_new_tokens: int,
        features: Sequence[Sequence[Tensor]] | None = None,
    ) -> list[Answer]:
        """One answer per (row, seed) with the stock `generate`, in one batch, under the current view.

        The randomness of an answer depends on (seed, row id) alone: not on the batch, and the same for every view.

        Args:
            rows: prompt, history and images are read.
            seeds: one per row.
            temperature: 0 is greedy decoding, 1 samples from the model's own distribution.
            max_new_tokens: longest answer.
            features: vision features of each row's images; default: its images are encoded here.
        """
        if len(rows) != len(seeds):
            raise ValueError(f"{len(rows)} rows but {len(seeds)} seeds: give one seed per row")
        if temperature < 0:
            raise ValueError(f"temperature = {temperature}: must be 0 (greedy) or positive")
        contexts = self._contexts(rows, features)
        active: Any = self.views.active()
        with self.autocast():
            new = generate(
                active,
                self._network_of_view(),
                contexts,
                [(seed, row.id) for row, seed in zip(rows, seeds, strict=True)],
                image_token_id=self.image_token_id,
                pad_token_id=self._pad_token_id(),
                end_ids=self._end_ids(),
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                device=self.device,
            )
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [
            Answer(row.prompt, text.strip(), seed, temperature, row.images)
            for row, seed, text in zip(rows, seeds, texts, strict=True)
        ]

    def _contexts(self, rows: Sequence[Row], features: Sequence[Sequence[Tensor]] | None) -> list[TokenContext]:
        refs: dict[str, ImageRef] = {}
        names = []
        for n, row in enumerate(rows):
            # Given features have no digest; the row's place names them.
            given = features is not None
            names.append([f"{n}:{i}" if given else ref.digest() for i, ref in enumerate(row.images)])
            refs.update(zip(names[-1], row.images, strict=True))
        if features is None:
            encoded = self.encode_images([ref.open() for ref in refs.values()])
            known = {name: record["features"] for name, record in zip(refs, encoded, strict=True)}
            features = [[known[name] for name in of_row] for of_row in names]
        return [
            TokenContext(self.text.prompt(row), tuple(of_row), tuple(ids))
            for row, of_row, ids in zip(rows, features, names, strict=True)
        ]

    def _end_ids(self) -> list[int]:
        own = self.model.generation_config.eos_token_id
        ends = [] if own is None else [own] if isinstance(own, int) else list(own)
        return list(dict.fromkeys(i for i in (*ends, self.processor.tokenizer.eos_token_id) if i is not None))

    # -- export ------------------------------------------------------------------------------------------------------

    def export(self, folder: Path) -> None:
        """The current view in the field's format.

        LoRA: a PEFT adapter folder, for transformers' `load_adapter` and `PeftModel.from_pretrained`. Full: a model folder
        with its processor, for `from_pretrained`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.config.lora is None:
            model: Any = self.views.active()
            model.save_pretrained(folder)
            self.processor.save_pretrained(folder)
            return
        save_adapter(self.model, ADAPTER, folder, base=self.config.path)
