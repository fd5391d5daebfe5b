"""The run: its folder, checkpoints and exact resume, logging, signals, preflight. Knows no method and no model."""
