"""From YAML to one frozen, typed `Config`: text with lines and layers (source.py), conversion to the declared types
(fitting.py), and the config, its presets and the checks of combinations (config.py).

Names are imported on first use: reading YAML must not import torch, which the sections of a config need.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2lab.config.config import (
        ALIASES,
        PRESETS,
        Config,
        ScaleConfig,
        config_from_text,
        examine,
        fill_slots,
        load_config,
        preset_name,
        preset_names,
        preset_source,
        read_overrides,
        resolve,
    )

__all__ = [
    "ALIASES", "PRESETS", "Config", "ScaleConfig", "config_from_text", "examine", "fill_slots", "load_config",
    "preset_name", "preset_names", "preset_source", "read_overrides", "resolve",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'gpt2lab.config' has no attribute {name!r}")
    return getattr(importlib.import_module("gpt2lab.config.config"), name)
