"""Reward models, one file each; `mmalign rewards list` shows them.

A reward is a class whose keyword-only parameters are its options and whose `__call__(images, prompts, **columns)`
returns one number per image; `mmalign/reward.py` holds the contract and calls it. To add one: write the file, add a
line to the `reward` table of `mmalign/registry.py`, run `mmalign rewards check NAME`. It can as well stay in your own
folder and be named as `path/to/file.py:Name` (`mmalign rewards new NAME` writes a start).

Rules: raw scores in the scale that the class declares; None or NaN with a reason for an image that cannot be scored;
heavy imports inside functions, so that listing the rewards loads no model code; neighbours imported relatively.

Gotchas: norms, dot products and heads run in fp32 whatever the towers' precision (bf16 would quantise scores to steps
larger than the differences that matter); preprocessing is part of a reward's definition.
"""
