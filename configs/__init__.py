"""Shipped recipes as package data: `mmalign train sdxl/diffusion_dpo_lora.yaml` finds them by name.

Each opens with its command, hardware, cost, metric and evidence level (E0 parses, E1 runs at tiny width, E2 run at full
size, E3 reproduces a published number). `presets/` pins the published settings of methods.
"""
