"""Sliding windows of the layers, from ``config.json`` as transformers 5 reads it.

Mistral has one ``sliding_window`` for all layers. Qwen2 and Qwen3 have it, if ``use_sliding_window``, in the layers
whose ``layer_types`` is ``sliding_attention``; where there are no ``layer_types``, in those from ``max_window_layers``
on. A token at position p attends to the keys k with ``0 <= p - k < window`` (``sliding_window_overlay`` in
``transformers/masking_utils.py``). Llama has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stablelora_jax.models.pretrained.fields import flag, size
from stablelora_jax.utils.errors import InputError

KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
SLIDING, FULL = "sliding_attention", "full_attention"
WINDOW, FIRST = 4096, 28  # defaults of sliding_window and max_window_layers


def read_windows(raw: Mapping[str, Any], source: str, layers: int) -> tuple[int, ...]:
    """The window of each layer, 0 for none; ``()`` where no layer has one.

    Raises:
      InputError: keys of the wrong kind, or that contradict each other.
    """
    named = _named_layers(raw, source, layers)
    family, used = raw["model_type"], flag(raw, "use_sliding_window", source)
    if family == "mistral":
        window = _window(raw, source)
        sliding = [window is not None] * layers
        if raw.get("use_sliding_window", window is not None) not in (None, window is not None):
            raise InputError(f"{source}: use_sliding_window {used} contradicts sliding_window {window}")
        if named not in (None, sliding):
            raise InputError(f"{source}: layer_types contradict sliding_window {window}, which all layers have")
    else:
        window = _window(raw, source) if used else None
        first = 0 if raw.get("max_window_layers") == 0 else size(raw, "max_window_layers", source, default=FIRST)
        sliding = [window is not None and i >= first for i in range(layers)] if named is None else named
        if any(sliding) and window is None:
            raise InputError(f"{source}: layer_types name {SLIDING}, but there is no sliding_window in use")
    return tuple(window * on for on in sliding) if window and any(sliding) else ()


def window_keys(model_type: str, windows: tuple[int, ...]) -> dict[str, Any]:
    """The keys of ``config.json`` that :func:`read_windows` reads ``windows`` from."""
    window = max(windows, default=0) or None
    if model_type == "llama":
        return {}
    if model_type == "mistral":
        return {"sliding_window": window}
    if window is None:
        return {"use_sliding_window": False, "sliding_window": None}
    first = next(i for i, own in enumerate(windows) if own)  # the only key that older versions read
    types = [SLIDING if own else FULL for own in windows]
    return {"use_sliding_window": True, "sliding_window": window, "max_window_layers": first, "layer_types": types}


def _window(raw: Mapping[str, Any], source: str) -> int | None:
    return size(raw, "sliding_window", source, WINDOW) if raw.get("sliding_window", WINDOW) is not None else None


def _named_layers(raw: Mapping[str, Any], source: str, layers: int) -> list[bool] | None:
    types = raw.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or not all(kind in (SLIDING, FULL) for kind in types):
        raise InputError(f"{source}: layer_types must be a list of {FULL} and {SLIDING}, not {types!r:.60}")
    if len(types) != layers:
        raise InputError(f"{source}: layer_types has {len(types)} entries for num_hidden_layers {layers}")
    return [kind == SLIDING for kind in types]
