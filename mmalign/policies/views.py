"""One network, several views of its weights: `policy` (trained), `reference` (frozen start), `ema`.

With LoRA the reference is the same network with the trained adapter off; stacked frozen adapters belong to both. With
full fine-tuning it is a second copy of the base, made when first asked for and dropped with `release_reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from mmalign import randomness
from mmalign.config import EmaConfig, LoraConfig
from mmalign.policies.base import View

ADAPTER = "mmalign"
# The second line: the text stream of joint attention (SD3, FLUX).
ATTENTION_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
ATTENTION_TARGETS += ["add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"]


class Views:
    """Owns the trainable parameters of `network` and switches between views.

    Args:
        network: the module to train.
        lora: adapter settings, None for full fine-tuning.
        train: False for inference: nothing is trainable and `lora` is ignored.
        stacked: names of adapters already loaded into `network`; they stay active and frozen.
        make_reference: builds the frozen base again (full fine-tuning only).
        seed: seeds the adapter's initialisation.
        untouched: modules that `targets: all` leaves alone.
        attention_targets: layer-name suffixes that `targets: attention` stands for.
        frozen: modules that nothing trains, neither adapters nor full fine-tuning.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        lora: LoraConfig | None,
        train: bool,
        stacked: Sequence[str],
        make_reference: Callable[[], nn.Module],
        seed: int,
        untouched: Sequence[str] = (),
        attention_targets: Sequence[str] = ATTENTION_TARGETS,
        frozen: Sequence[str] = (),
    ) -> None:
        self.network: nn.Module = network
        self._stacked = list(stacked)
        self._lora = lora is not None and train
        self._make_reference = make_reference
        self._reference: nn.Module | None = None
        self._ema: Any = None
        self._layers: list[Any] = []
        self.current: View = "policy"
        network.requires_grad_(False)
        if not train:
            if self._stacked:
                self._activate(self._stacked)
        elif lora is not None:
            targets = lora_targets(network, lora, untouched, attention_targets, frozen)
            add_lora(network, lora, targets, seed=seed)
            self._activate([*self._stacked, ADAPTER])
        else:
            if stacked:
                raise ValueError(
                    "model.adapters needs model.lora: full fine-tuning cannot export weights with a frozen adapter on "
                    "top. Fuse the adapter into the base first (pipeline.fuse_lora) or train a LoRA"
                )
            network.float().requires_grad_(True)
            for name in frozen:
                network.get_submodule(name).requires_grad_(False)
        self._trainable = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        # eval() for good: no dropout, so that policy and reference differ by their weights alone.
        network.eval()

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return self._trainable

    def active(self) -> nn.Module:
        """The module that computes the current view."""
        if self.current == "reference" and not self._lora:
            return self.reference()
        return self.network

    def reference(self) -> nn.Module:
        if self._reference is None:
            self._reference = self._make_reference().eval()
            # Without a graph this changes one thing: matmul folds the batch of a weight that requires a gradient, and
            # rounds differently. The reference takes the policy's path, or step 0 is not ln 2 in half precision.
            trained = {name for name, _ in self._trainable}
            for name, parameter in self._reference.named_parameters():
                parameter.requires_grad_(name in trained)
        return self._reference

    def release_reference(self) -> None:
        """Free the second copy; it is built again when asked for."""
        self._reference = None

    def start_ema(self, config: EmaConfig) -> Any:
        from diffusers.training_utils import EMAModel

        self._ema = EMAModel([p for _, p in self._trainable], decay=config.decay, foreach=True)
        return self._ema

    @contextmanager
    def view(self, name: View) -> Iterator[None]:
        """Compute with the weights of `name` inside the block. The one way to switch weights; always switches back."""
        if name == self.current:
            yield
            return
        if self.current != "policy":
            raise ValueError(f"view {name!r} inside view {self.current!r}: leave the outer view first")
        if name == "reference":
            switch = self._reference_view()
        elif name == "ema":
            switch = self._ema_view()
        else:
            raise ValueError(f"view {name!r}: must be policy, reference or ema")
        with switch:
            self.current = name
            try:
                yield
            finally:
                self.current = "policy"

    @contextmanager
    def _reference_view(self) -> Iterator[None]:
        if not self._lora:
            yield
            return
        self._switch(self._stacked)
        try:
            yield
        finally:
            self._switch([*self._stacked, ADAPTER])

    @contextmanager
    def _ema_view(self) -> Iterator[None]:
        if self._ema is None:
            raise ValueError("view 'ema': no moving average is kept; set train.ema.decay")
        parameters = [p for _, p in self._trainable]
        self._ema.store(parameters)
        self._ema.copy_to(parameters)
        try:
            yield
        finally:
            self._ema.restore(parameters)

    def _switch(self, names: list[str]) -> None:
        """Make exactly `names` active, in every step and therefore without PEFT's public walk over all modules.

        The public calls also flip `requires_grad`, of frozen adapters too; on SDXL they take 60 ms of host time each way.
        """
        for layer in self._layers:
            layer._active_adapter = list(names)

    def _activate(self, names: list[str]) -> None:
        """Make `names` active through PEFT, once, and let only the trained adapter require gradients."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._layers = [module for module in self.network.modules() if isinstance(module, BaseTunerLayer)]
        for layer in self._layers:
            layer.set_adapter(names)
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(f".{ADAPTER}." in name)


class OnViews:
    """Base of the policies: what each passes on to its `views`, and the precision that all views compute in."""

    views: Views
    device: torch.device
    dtype: torch.dtype

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Named trainable parameters of `network`, fp32."""
        return self.views.trainable()

    def view(self, name: View) -> AbstractContextManager[None]:
        """Compute with the weights of `name` inside the block. Entering raises `ValueError` for an unknown name, inside
        another view, and for `ema` where no moving average is kept."""
        return self.views.view(name)

    def start_ema(self, config: EmaConfig) -> Any:
        """Start the moving average behind the `ema` view and return it (`step`, `shadow_params`)."""
        return self.views.start_ema(config)

    def release_reference(self) -> None:
        """Free the second copy of the weights, if there is one; it is built again when asked for."""
        self.views.release_reference()

    def autocast(self) -> AbstractContextManager[Any]:
        """The one precision context of policy and reference."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


def add_lora(network: Any, lora: LoraConfig, targets: Sequence[str], *, seed: int) -> None:
    """Attach the trainable adapter, fp32 whatever the base's dtype (bf16 adapters lose small updates to rounding)."""
    from peft import LoraConfig as PeftLoraConfig

    config = PeftLoraConfig(
        r=lora.rank, lora_alpha=lora.alpha or lora.rank, init_lora_weights="gaussian", target_modules=list(targets)
    )
    with randomness.global_seed(seed, "lora", ADAPTER):
        try:
            network.add_adapter(config, adapter_name=ADAPTER)
        except ValueError as error:
            raise ValueError(f"model.lora.targets = {lora.targets!r} fits no layer of the network: {error}") from error
    for name, parameter in network.named_parameters():
        if f".{ADAPTER}." in name:
            parameter.data = parameter.data.float()


def lora_targets(
    network: nn.Module,
    lora: LoraConfig,
    untouched: Sequence[str],
    attention_targets: Sequence[str],
    frozen: Sequence[str],
) -> list[str]:
    """What PEFT is to adapt: layer-name suffixes, or whole names where a suffix would also fit a frozen module."""
    if lora.targets == "all":
        return all_targets(network, [*untouched, *frozen])
    suffixes = list(attention_targets if lora.targets == "attention" else lora.targets)
    if not frozen:
        return suffixes
    names = [
        name for name in all_targets(network, frozen) if any(f".{name}".endswith(f".{suffix}") for suffix in suffixes)
    ]
    if not names:
        raise ValueError(
            f"model.lora.targets = {lora.targets!r} fits no trainable layer of the network "
            f"({', '.join(frozen)} stays frozen)"
        )
    return names


def all_targets(network: nn.Module, untouched: Sequence[str]) -> list[str]:
    """Names of all linear and conv layers of the base, except those of `untouched` modules and of stacked adapters."""
    names = []
    for name, module in network.named_modules():
        name = name.removesuffix(".base_layer")
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or ".lora_" in name:
            continue
        if not any(f"{name}.".startswith(f"{prefix}.") for prefix in untouched):
            names.append(name)
    return names


def lean_copy(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Store matmul and conv weights in the autocast dtype: half the memory, the same numbers.

    Autocast casts exactly these weights before use, so the policy's fp32 masters and this copy compute alike; norms and
    embeddings, which autocast leaves alone, stay fp32, and so does an output layer tied to an embedding.
    """
    if dtype == torch.float32:
        return network
    cast, kept = [], set()
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            cast.append(module)
        else:
            kept |= {id(parameter) for parameter in module.parameters(recurse=False)}
    for module in cast:
        if not any(id(parameter) in kept for parameter in module.parameters()):
            module.to(dtype)
    return network
