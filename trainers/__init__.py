"""The loops and the methods. `offline.py` is the loop over fixed data; each method is one short file.

A score method is a class whose keyword-only parameters are its config options, with two pure functions: `requests(batch)`
says what to score, `loss(batch, policy, reference)` turns scores into an unreduced loss. The loop owns everything else.
"""
