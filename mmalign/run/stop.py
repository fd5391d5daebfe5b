"""The stop rule: end a run when the moving average of a logged metric crosses a bound."""

from __future__ import annotations

from collections.abc import Mapping

from mmalign.config import StopConfig
from mmalign.run.checkpoint import LoopState


class StopRule:
    """`train.stop`. Its average is part of the loop's state, so that a resumed run stops at the same step."""

    def __init__(self, config: StopConfig) -> None:
        self.config = config

    def follow(self, state: LoopState, means: Mapping[str, float]) -> None:
        """Take a logged line into the average. Raises `ConfigError` if the line lacks the metric."""
        self.config.check_metric(means)
        value, past, smoothing = means[self.config.metric], state.stop_average, self.config.smoothing
        state.stop_average = value if past is None else smoothing * past + (1 - smoothing) * value

    def reached(self, state: LoopState) -> str | None:
        """What ends the run, in words; None while it goes on."""
        rule, average = self.config, state.stop_average
        if average is None:
            return None
        if rule.above is not None and average > rule.above:
            return f"the average of {rule.metric} is {average:.4g} > {rule.above}"
        if rule.below is not None and average < rule.below:
            return f"the average of {rule.metric} is {average:.4g} < {rule.below}"
        return None
