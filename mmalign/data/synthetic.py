"""Pairs drawn in the tiny synthetic world, where it is known exactly which image fits its caption."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from mmalign.types import DataError, ImageRef, Row
