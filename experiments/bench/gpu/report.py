"""Writes ``report.md`` of a suite from the rows measured so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.gpu.suite import MARKS, PEERS, PROFILE, RIGHT, SERVING, Measurement

TARGETS = {"ratio": 1.5, "memory": 0.8}  # speed and memory relative to the fastest peer
MFU = {"qwen2-0.5b": 0.30, "qwen3-0.6b": 0.30, "llama3.1-8b": 0.42, "qwen3-8b": 0.42}  # targets; else 0.35
PUBLISHED = {  # tokens per second on one GPU in bf16, as published; other software, often another attention kernel
    "llama3.1-8b": "NeMo AutoModel 12,473 (H100)",
    "qwen3-0.6b": "surogate 53.9k to 62k (H100), 65.2k (H200); Unsloth 21.7k (H200)",
    "qwen3-1.7b": "surogate 32.8k to 37.5k (H100), 39k (H200); Unsloth 21.4k (H200)",
    "qwen3-4b": "surogate 15.9k to 17.5k (H100), 18.3k (H200); Unsloth 12.8k (H200)",
    "qwen3-8b": "surogate 10.2k to 11.6k (H100), 11.7k (H200); Unsloth 9.1k (H200)",
}
HEAD = "| {} | batch | tokens/s | step, ms (quartiles) | MFU | memory, GB | compile, s |"


def report(suite: Sequence[Measurement], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The report as Markdown."""
    toy = any(row["arguments"].get("toy") for row in rows.values())
    lines = [f"# {'Rehearsal' if toy else 'Results'} of `bench.py gpu`", "", *_provenance(rows)]
    writers = {RIGHT: _right, PEERS: _peers, MARKS: _marks, PROFILE: _profile, SERVING: _serving}
    sections = {one.name: one.section for one in suite}  # rows of an earlier version may name their section otherwise
    for section, writer in writers.items():
        done = [row for row in rows.values() if row["status"] == "done"]
        found = [row for row in done if sections.get(row["name"], row["section"]) == section]
        lines += ["", f"## {section}", "", *(writer(_ordered(suite, found)) if found else ["Nothing yet."])]
    return "\n".join([*lines, *_rest(suite, rows)]) + "\n"


def _ordered(suite: Sequence[Measurement], rows: list[Any]) -> list[Any]:
    order = {one.name: index for index, one in enumerate(suite)}
    return sorted(rows, key=lambda row: order.get(row["name"], len(order)))


def _provenance(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """All GPUs, commits, source hashes and versions that occur in the rows, and the first and last date."""
    if not rows:
        return ["No row yet."]
    found = {key: sorted({str(row[key]) for row in rows.values()}) for key in ("card", "commit", "source", "date")}
    found["date"] = sorted({found["date"][0], found["date"][-1]})
    versions = sorted({f"{name} {value}" for row in rows.values() for name, value in row["versions"].items()})
    lines = [f"{key}: {', '.join(values)}  " for key, values in found.items()]
    return [*lines, f"versions: {', '.join(versions)}"]


def _right(rows: list[Any]) -> Iterator[str]:
    devices = sorted({row["measured"]["device"] for row in rows if "device" in row["measured"]})
    yield from (f"On {', '.join(devices)}, compared with the CPU.", "") if devices else ()
    yield "| | passed | quantity | difference | bound |"
    yield "| --- " * 5 + "|"
    for row in rows:
        found = row["measured"]
        name, passed = row["name"].removeprefix("right."), "yes" if found["ok"] else "**NO**"
        if "differences" not in found:
            text = f"killed after step {found['killed_after_step']} of {found['steps']}, then resumed"
            yield f"| {name} | {passed} | {text} | {'none' if found['equal_to_the_bit'] else 'some'} | none |"
            continue
        for what, value in found["differences"].items():
            bound = found["bounds"].get(what)
            passed = "" if bound is None else "yes" if value <= bound else "**NO**"
            yield f"| {name} | {passed} | {what} | {value:.2e} | {'' if bound is None else f'{bound:.1e}'} |"
        for what, why in found.get("absent", {}).items():
            yield f"| {name} | | {what}: {why} | | |"


def _line(name: str, row: Any) -> str:
    found, given = row["measured"], row["arguments"]
    low, high = (1e3 * value for value in found["step_seconds_quartiles"])
    mfu = "-" if found["mfu"] is None else f"{100 * found['mfu']:.1f} %"
    memory = "-" if found["peak_memory_bytes"] is None else f"{found['peak_memory_bytes'] / 1e9:.2f}"
    batch = f"{given['batch']}" + (f" in {given['accumulate']}" if given.get("accumulate", 1) > 1 else "")
    batch += " (reduced: out of memory)" if row.get("tried") else ""
    name += "" if found.get("ok", True) else " **(the loss is not finite)**"
    step = f"{1e3 * found['step_seconds']:.1f} ({low:.1f} to {high:.1f})"
    cells = (name, batch, f"{found['tokens_per_second']:,.0f}", step, mfu, memory, f"{found['compile_seconds']:.1f}")
    return f"| {' | '.join(cells)} |"


def _peers(rows: list[Any]) -> Iterator[str]:
    """One table per shape, followed by the ratios of our side with AdamW to the fastest peers."""
    tables: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = row["name"].removeprefix("train.")
        shape, _, side = name.rpartition(".")
        tables.setdefault(shape, {})[side] = row
    for shape, sides in tables.items():
        given = next(iter(sides.values()))["arguments"]
        packed = f"{given['documents']} documents per row" if given["documents"] > 1 else "one document per row"
        yield from (f"### {shape}: rows of {given['length']} tokens, {packed}, r={given['rank']}, {given['dtype']}", "")
        yield from (HEAD.format("side"), "| --- " * 7 + "|")
        yield from (_line(side, row) for side, row in sides.items())
        yield from ("", *_verdicts(shape, sides), "")


def _verdicts(shape: str, sides: dict[str, Any]) -> Iterator[str]:
    ours, peers = sides.get("adamw"), {name: row for name, row in sides.items() if name.startswith(("peft", "tunix"))}
    if ours is None:
        return
    rate = ours["measured"]["tokens_per_second"]
    target = MFU.get(shape, 0.35)
    if ours["measured"]["mfu"] is not None:
        yield f"MFU {100 * ours['measured']['mfu']:.1f} % (target {100 * target:.0f} %). "
    for kind in ("peft", "tunix"):
        own = {name: row for name, row in peers.items() if name.startswith(kind)}
        if own:
            best = max(own, key=lambda name: own[name]["measured"]["tokens_per_second"])
            ratio = rate / own[best]["measured"]["tokens_per_second"]
            peaks = [side["measured"]["peak_memory_bytes"] for side in (ours, own[best])]
            memory = f", {peaks[0] / peaks[1]:.2f} of its memory (target {TARGETS['memory']})" if all(peaks) else ""
            yield f"{ratio:.2f} times the speed of {best} (target {TARGETS['ratio']}){memory}. "


def _marks(rows: list[Any]) -> Iterator[str]:
    yield HEAD.format("shape, remat policy (chosen by auto)") + " published, tokens/s |"
    yield "| --- " * 8 + "|"
    for row in rows:
        shape, _, policy = row["name"].removeprefix("mark.").rpartition(".")
        chosen = row["measured"].get("remat")
        name = f"{shape}, {policy}" + (f" ({chosen})" if policy == "auto" and chosen else "")
        yield f"{_line(name, row)} {PUBLISHED.get(shape, '') if policy == 'auto' else ''} |"


def _profile(rows: list[Any]) -> Iterator[str]:
    from bench.gpu.profile import table

    for row in rows:
        yield from (f"### {row['name'].removeprefix('profile.')}", "", table(row["measured"]))


def _serving(rows: list[Any]) -> Iterator[str]:
    yield "| | quantity | value |"
    yield "| --- " * 3 + "|"
    for row in rows:
        for what, value in row["measured"].items():
            for inner, number in value.items() if isinstance(value, dict) else [("", value)]:
                name = ", ".join(filter(None, (what, inner.replace("_", " "))))
                yield f"| {row['name'].removeprefix('serve.')} | {name.replace('_', ' ')} | {_shown(number)} |"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_shown(part) for part in value)
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else f"{value}"


def _rest(suite: Sequence[Measurement], rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The rows without a result, and why."""
    failed = {name: row for name, row in rows.items() if row["status"] != "done"}
    missing = [one.name for one in suite if one.name not in rows]
    yield from ("", "## Failed", "") if failed else ()
    yield from (f"- {name}: {row['status']}, {row['why']}" for name, row in failed.items())
    yield from ("", "## Not measured yet", "") if missing else ()
    yield from (f"- {name}" for name in missing)
