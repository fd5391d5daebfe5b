"""The loops and the methods. `offline.py` is the loop over fixed data, `online.py` the loop over rollouts of the policy;
each method is one short file: a class whose keyword-only parameters are its config options.

A score method (`preference.py`) has two pure functions: `requests(batch)` says what to score, `loss(batch, policy,
reference)` turns scores into an unreduced loss. A step method (`grpo.py`) has three: `rollout` draws samples and says which
steps to record, `advantages` turns rewards into weights, `loss` turns a replayed step into an unreduced loss. The loop
owns everything else. docs/how_a_method_and_a_model_meet.md walks through both.
"""
