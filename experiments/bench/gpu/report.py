"""``report.md`` of a suite, from the rows that there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.gpu.suite import MARKS, PEERS, PROFILE, RIGHT, SERVING, Measurement

ASKED = {"ratio": 1.5, "memory": 0.8}  # of the fastest peer's
MFU = {"qwen2-0.5b": 0.30, "qwen3-0.6b": 0.30, "llama3.1-8b": 0.42, "qwen3-8b": 0.42}  # else 0.35
PUBLISHED = {  # tokens a second, bf16, of one card, as the pages say on other software, often with other attention
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
    lines = [f"# {'A rehearsal of' if toy else 'Measured by'} `bench.py gpu`", "", *_where(rows)]
    writers = {RIGHT: _right, PEERS: _peers, MARKS: _marks, PROFILE: _profile, SERVING: _serving}
    for section, writer in writers.items():
        found = [row for row in rows.values() if row["section"] == section and row["status"] == "done"]
        lines += ["", f"## {section}", "", *(writer(_ordered(suite, found)) if found else ["Nothing yet."])]
    return "\n".join([*lines, *_rest(suite, rows)]) + "\n"


def _ordered(suite: Sequence[Measurement], rows: list[Any]) -> list[Any]:
    places = {one.name: place for place, one in enumerate(suite)}
    return sorted(rows, key=lambda row: places.get(row["name"], len(places)))


def _where(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Cards, versions, commits: all that occur."""
    if not rows:
        return ["No row yet."]
    said = {key: sorted({str(row[key]) for row in rows.values()}) for key in ("card", "commit", "source", "date")}
    said["date"] = sorted({said["date"][0], said["date"][-1]})
    versions = sorted({f"{name} {value}" for row in rows.values() for name, value in row["versions"].items()})
    lines = [f"{key}: {', '.join(values)}  " for key, values in said.items()]
    return [*lines, f"versions: {', '.join(versions)}"]


def _right(rows: list[Any]) -> Iterator[str]:
    devices = sorted({row["measured"]["device"] for row in rows if "device" in row["measured"]})
    yield from (f"On {', '.join(devices)}, beside the CPU.", "") if devices else ()
    yield "| | holds | what | difference | at most |"
    yield "| --- " * 5 + "|"
    for row in rows:
        found = row["measured"]
        name, holds = row["name"].removeprefix("right."), "yes" if found["ok"] else "**NO**"
        if "differences" not in found:
            said = f"killed after step {found['killed_after_step']} of {found['steps']}, then started again"
            yield f"| {name} | {holds} | {said} | {'none' if found['equal_to_the_bit'] else 'some'} | none |"
            continue
        for what, value in found["differences"].items():
            bound = found["bounds"].get(what)
            held = "" if bound is None else "yes" if value <= bound else "**NO**"
            yield f"| {name} | {held} | {what} | {value:.2e} | {'' if bound is None else f'{bound:.1e}'} |"
        for what, why in found.get("absent", {}).items():
            yield f"| {name} | | {what}: {why} | | |"


def _line(name: str, row: Any) -> str:
    found, given = row["measured"], row["arguments"]
    low, high = (1e3 * value for value in found["step_seconds_quartiles"])
    mfu = "-" if found["mfu"] is None else f"{100 * found['mfu']:.1f} %"
    memory = "-" if found["peak_memory_bytes"] is None else f"{found['peak_memory_bytes'] / 1e9:.2f}"
    rows_of = f"{given['batch']}" + (f" in {given['accumulate']}" if given.get("accumulate", 1) > 1 else "")
    rows_of += " (less: out of memory)" if row.get("tried") else ""
    name += "" if found.get("ok", True) else " **(the loss is not finite)**"
    step = f"{1e3 * found['step_seconds']:.1f} ({low:.1f} to {high:.1f})"
    cells = (name, rows_of, f"{found['tokens_per_second']:,.0f}", step, mfu, memory, f"{found['compile_seconds']:.1f}")
    return f"| {' | '.join(cells)} |"


def _peers(rows: list[Any]) -> Iterator[str]:
    """A table for each shape, and how ours with AdamW stands to the fastest peer."""
    tables: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = row["name"].removeprefix("train.")
        shape, _, side = name.rpartition(".")
        tables.setdefault(shape, {})[side] = row
    for shape, sides in tables.items():
        given = next(iter(sides.values()))["arguments"]
        texts = f"{given['documents']} texts a row" if given["documents"] > 1 else "one text a row"
        yield from (f"### {shape}: rows of {given['length']} tokens, {texts}, r={given['rank']}, {given['dtype']}", "")
        yield from (HEAD.format("side"), "| --- " * 7 + "|")
        yield from (_line(side, row) for side, row in sides.items())
        yield from ("", *_verdicts(shape, sides), "")


def _verdicts(shape: str, sides: dict[str, Any]) -> Iterator[str]:
    ours, peers = sides.get("adamw"), {name: row for name, row in sides.items() if name.startswith(("peft", "tunix"))}
    if ours is None:
        return
    rate = ours["measured"]["tokens_per_second"]
    wanted = MFU.get(shape, 0.35)
    if ours["measured"]["mfu"] is not None:
        yield f"MFU {100 * ours['measured']['mfu']:.1f} % (asked {100 * wanted:.0f} %). "
    for kind in ("peft", "tunix"):
        own = {name: row for name, row in peers.items() if name.startswith(kind)}
        if own:
            best = max(own, key=lambda name: own[name]["measured"]["tokens_per_second"])
            ratio = rate / own[best]["measured"]["tokens_per_second"]
            held = [side["measured"]["peak_memory_bytes"] for side in (ours, own[best])]
            memory = f", {held[0] / held[1]:.2f} of its memory (asked {ASKED['memory']})" if all(held) else ""
            yield f"{ratio:.2f} times {best} (asked {ASKED['ratio']}){memory}. "


def _marks(rows: list[Any]) -> Iterator[str]:
    yield HEAD.format("shape, policy asked for (taken)") + " published, tokens/s |"
    yield "| --- " * 8 + "|"
    for row in rows:
        shape, _, policy = row["name"].removeprefix("mark.").rpartition(".")
        taken = row["measured"].get("remat")
        name = f"{shape}, {policy}" + (f" ({taken})" if policy == "auto" and taken else "")
        yield f"{_line(name, row)} {PUBLISHED.get(shape, '') if policy == 'auto' else ''} |"


def _profile(rows: list[Any]) -> Iterator[str]:
    from bench.gpu.profile import table

    for row in rows:
        yield from (f"### {row['name'].removeprefix('profile.')}", "", table(row["measured"]))


def _serving(rows: list[Any]) -> Iterator[str]:
    yield "| | what | value |"
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
    """What there is no number of, and why."""
    failed = {name: row for name, row in rows.items() if row["status"] != "done"}
    missing = [one.name for one in suite if one.name not in rows]
    yield from ("", "## What failed", "") if failed else ()
    yield from (f"- {name}: {row['status']}, {row['why']}" for name, row in failed.items())
    yield from ("", "## What was not reached", "") if missing else ()
    yield from (f"- {name}" for name in missing)
