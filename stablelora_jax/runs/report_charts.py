"""Charts as inline SVG for a page: colours are CSS variables, so that the page chooses light or dark ones.

Matplotlib draws; its few colours are then replaced by variables, its identifiers get a prefix, and the legend becomes
HTML beside the chart, where it stays readable on a phone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from markupsafe import Markup

from stablelora_jax.runs import panels, ratio_panel

INK, MUTED, GRID = "#010203", "#040506", "#070809"  # stand for the page's colours of text, axes and grid
VARIABLES = {
    **dict(zip((INK, MUTED, GRID), ("ink", "muted", "grid"), strict=True)),
    panels.BLUE: "blue",
    panels.ORANGE: "orange",
    panels.GREEN: "green",
    panels.VERMILLION: "vermillion",
    panels.PURPLE: "purple",
    panels.SKY: "sky",
    panels.GRAY: "gray",
    **{color: f"layer-{i}" for i, color in enumerate(ratio_panel.SEQUENCE)},
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 11,
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
}
DASHES = {"-": "", "--": "6 3", ":": "1.5 2.5", "-.": "6 2.5 1.5 2.5", "None": ""}
PANEL = (0.165, 0.145, 0.82, 0.825)  # left, bottom, width, height: the axes of all charts align
MARKERS = {"x": "cross", "|": "tick"}


class Key(NamedTuple):
    """An entry of a legend."""

    label: str
    variable: str  # of its colour
    kind: str  # line, band, dot, cross or tick
    dashes: str  # as stroke-dasharray
    opacity: float


class Chart(NamedTuple):
    """A chart of a page."""

    id: str
    title: str
    caption: str
    svg: Markup
    keys: list[Key]


def chart(
    identity: str, title: str, caption: str, draw: Callable[[Any], None], size: tuple[float, float] = (5.2, 3.3)
) -> Chart:
    """What ``draw`` draws into the axes that it is given.

    Args:
      identity: begins the identifiers inside the SVG; another one for each chart of a page.
      title: above the chart, and its name for screen readers.
      caption: says what to see.
      draw: a function of :mod:`stablelora_jax.runs.panels`, or like one.
      size: in inches; the page scales it to the width that is there.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE | {"svg.hashsalt": identity}):
        figure = Figure(figsize=size)
        axes = figure.add_axes(PANEL)
        draw(axes)
        keys = _legend(axes)
        content = io.StringIO()
        figure.savefig(content, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator")))
    return Chart(identity, title, caption, _inline(content.getvalue(), identity), keys)


def _legend(axes: Any) -> list[Key]:
    from matplotlib.colors import to_hex, to_rgba_array
    from matplotlib.lines import Line2D

    found: dict[str, Key] = {}
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        if isinstance(handle, Line2D):
            color, opacity, style = handle.get_color(), float(handle.get_alpha() or 1), str(handle.get_linestyle())
            kind = MARKERS.get(str(handle.get_marker()), "dot") if style == "None" else "line"
            dashes = DASHES.get(style, "")
        else:
            color = to_rgba_array(handle.get_facecolor())[0]
            kind, dashes, opacity = "band", "", min(1.0, 2 * float(color[3]))
        variable = VARIABLES.get(to_hex(color).lower(), "ink")
        found.setdefault(label, Key(label, variable, kind, dashes, opacity))
    return list(found.values())


def _inline(text: str, identity: str) -> Markup:
    """The ``svg`` element of a file, to stand in a page."""
    text = text[text.index("<svg") :].rstrip()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', text)
    text = re.sub(
        r"<svg[^>]*>", f'<svg {box[0] if box else ""} role="img" aria-labelledby="{identity}-title">', text, count=1
    )
    text = re.sub(r'\bid="', f'id="{identity}-', text)
    text = re.sub(r'xlink:href="#', f'href="#{identity}-', text)
    text = text.replace("url(#", f"url(#{identity}-")
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    return Markup(re.sub(r"\n\s*", "\n", text))
