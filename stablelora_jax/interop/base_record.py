"""The base that an adapter was trained on: recorded in ``stablelora.json``, and compared when the adapter is loaded.

The record is the base's name and, for each leaf, the :func:`~stablelora_jax.utils.fingerprint.fingerprint` of its bits
and of its values rounded to bfloat16. A leaf of the recorded dtype is compared by its bits, another by the rounded
values, so that a base in float32 equals the same base in bfloat16. Leaves of other shapes, or of one side only (an
untied head, kernels that are quantised on one side), are not compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stablelora_jax.utils.fingerprint import fingerprint, form, named_leaves

KEY = "base"


def base_record(params: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """The record of the base ``params``, called ``name``. With several processes, all of them must call this."""
    return {"name": name, "fingerprint": fingerprint(params), "rounded": fingerprint(params, rounded=True)}


def other_base(record: object, params: Mapping[str, Any], name: str | None) -> str | None:
    """How ``params``, called ``name``, differ from the base of ``record``: a phrase that names both, or None if equal.

    A damaged or missing ``record`` gives None.

    Example::

        >>> import numpy as np
        >>> record = base_record({"norm": {"scale": np.ones(3)}}, "org/one")
        >>> other_base(record, {"norm": {"scale": np.ones(3)}}, "org/two")
        >>> other_base(record, {"norm": {"scale": np.zeros(3)}}, "org/two")
        'was trained on org/one, and org/two differs from it in norm.scale'
    """
    if not isinstance(record, Mapping):
        return None
    different: list[str] = []
    remaining = named_leaves(params)
    for key, rounded in (("fingerprint", False), ("rounded", True)):
        recorded = record.get(key)
        recorded = recorded if isinstance(recorded, Mapping) else {}
        same_form = {n: x for n, x in remaining.items() if str(recorded.get(n, "")).split(" ")[0] == form(x, rounded)}
        different += [n for n, found in fingerprint(same_form, rounded=rounded).items() if found != recorded[n]]
        remaining = {n: x for n, x in remaining.items() if n not in same_form}
    if not different:
        return None
    theirs, ours = record.get("name") or "a base without a name", name or "the base that was given"
    more = f" and {len(different) - 1} more" if len(different) > 1 else ""
    theirs = f"another {theirs}" if theirs == ours else theirs
    return f"was trained on {theirs!s:.200}, and {ours} differs from it in {sorted(different)[0]}{more}"
