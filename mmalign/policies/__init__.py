"""Policies: what the core can align, behind one protocol (`base.py`).

`diffusion.py` serves every ε/v denoiser; `families/` holds what differs between SD1.x, SDXL …: how to load, how text
conditions the network. `views.py` is the only way to switch weights. To add a family, subclass in `families/` (or in your
own file, `model.family: ./my_family.py:MyModel`) and implement the hooks of `DiffusionPolicy`; no method needs a change.
"""
