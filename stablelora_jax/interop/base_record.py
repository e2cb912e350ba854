"""Which base an adapter was made on: kept in ``stablelora.json``, and compared where it is laid on a base again.

The record is the base's name and :func:`~stablelora_jax.utils.fingerprint.fingerprint`, leaf by leaf, of the bits and
of the numbers rounded to bfloat16. Where a leaf has the dtype that it had, its bits are compared; else what both round
to, so that a base in float32 is the base that it was in bfloat16. Leaves of other shapes, or of one side alone (an
untied head, kernels that are quantised on one side), tell nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stablelora_jax.utils.fingerprint import fingerprint, form, named_leaves

KEY = "base"


def base_record(params: Any, name: str | None) -> dict[str, Any]:
    """What is kept of the base ``params``, called ``name``; of several processes all must make the call."""
    return {"name": name, "fingerprint": fingerprint(params), "rounded": fingerprint(params, rounded=True)}


def other_base(record: Any, params: Any, name: str | None) -> str | None:
    """In what ``params``, called ``name``, differ from the base of ``record``, as a phrase that names both; or None.

    A ``record`` that is none of ours tells nothing.
    """
    if not isinstance(record, Mapping):
        return None
    odd: list[str] = []
    left = named_leaves(params)
    for key, rounded in (("fingerprint", False), ("rounded", True)):
        kept = record.get(key)
        kept = kept if isinstance(kept, Mapping) else {}
        alike = {n: x for n, x in left.items() if str(kept.get(n, "")).split(" ")[0] == form(x, rounded)}
        odd += [n for n, found in fingerprint(alike, rounded=rounded).items() if found != kept[n]]
        left = {n: x for n, x in left.items() if n not in alike}
    if not odd:
        return None
    theirs, ours = record.get("name") or "a base without a name", name or "the base that was given"
    more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    theirs = f"another {theirs}" if theirs == ours else theirs
    return f"was made on {theirs!s:.200}, and {ours} differs from it in {sorted(odd)[0]}{more}"
