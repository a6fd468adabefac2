"""Dropout off, wherever a model holds it."""

from __future__ import annotations

from typing import Any

from torch import nn


def without_dropout(model: Any) -> Any:
    """The same model with every dropout at 0, wherever its forward reads it: the update runs in training mode, and log-probs must repeat.

    The modules hold it as nn.Dropout or as a number, or read it from the config; the copy that is published keeps the start's config.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        for held in (vars(module), vars(config) if hasattr(config, "to_dict") else {}):
            for name, value in list(held.items()):
                if isinstance(value, float) and "drop" in name:
                    held[name] = 0.0
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model
