"""The policy for rectified-flow transformers on a diffusers pipeline (SD3 and what looks like it).

x_σ = (1 − σ) x₀ + σ ε, the network predicts v = ε − x₀; everything else is the diffusion policy's.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from mmalign.diffusion.kernels import FlowKernel, Steps, flow_steps
from mmalign.diffusion.schedule import FlowSchedule, dynamic_mu
from mmalign.policies.diffusion import DiffusionPolicy


class FlowPolicy(DiffusionPolicy):
    """A diffusers pipeline around one flow transformer."""

    network_role = "transformer"
    # xformers wants queries, keys and values of one dtype; normalised queries of a network with fp32 masters are not.
    auto_attention = "sdpa"
    kernels = ("dance_sde", "flow_sde", "ode")
    unread = tuple(key for key in DiffusionPolicy.unread if not key.startswith("model."))

    def make_schedule(self) -> FlowSchedule:
        model = self.config
        density = None if model.timestep_density == "family" else model.timestep_density
        return FlowSchedule.from_scheduler(
            self.pipe.scheduler, num_tokens=self.num_tokens, density=density, shift=model.timestep_shift
        )

    @property
    def num_tokens(self) -> int:
        """Image tokens of the transformer at the training resolution."""
        return (self.resolution // self.scale_factor // self.module.config.patch_size) ** 2

    def call(self, network: nn.Module, x: Tensor, time_N: Tensor, conditioning: dict[str, Any]) -> Tensor:
        return network(hidden_states=x, timestep=time_N, return_dict=False, **conditioning)[0]

    def rollout_steps(self, *, kernel: str, level: float, num_steps: int, stochastic_S: Tensor | None = None) -> Steps:
        """The transitions of a rollout on the σ that the pipeline's own scheduler samples with.

        Raises `ValueError` for a kernel of another process, and as `kernels.flow_steps` does.
        """
        if kernel not in self.kernels:
            raise ValueError(
                f"kernel {kernel!r} does not fit {self.config.family!r}: must be {' or '.join(self.kernels)}"
            )
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        shifted = scheduler.config.get("use_dynamic_shifting")
        scheduler.set_timesteps(num_steps, **({"mu": dynamic_mu(scheduler.config, self.num_tokens)} if shifted else {}))
        return flow_steps(
            scheduler.sigmas,
            kernel=cast(FlowKernel, kernel),
            level=level,
            stochastic_S=stochastic_S,
            time_scale=self.schedule.num_timesteps,
        )
