"""Matplotlib figures as inline SVG, with colours and font of the page."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The colours of page.html: CSS variables with a light and a dark value.
NAMES = ("ink", "muted", "line", "own", "other", "neutral", "third", "fourth", "paper")
SERIES = ("own", "other", "third", "fourth", "ink")
POINTS_AN_INCH = 72


def colour(name: str) -> str:
    """Return the placeholder colour of a CSS variable, which no figure uses otherwise."""
    return f"#0a0b{NAMES.index(name):02x}"


def draw(name: str, size: tuple[float, float], title: str, paint: Callable[[Figure], None]) -> str:
    """Return a figure of `size` points as `<svg>`; `name` makes its ids unique, `title` is for screen readers."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it reports its search for fonts
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about missing glyphs and equal values: both are drawn
        matplotlib.rcdefaults()  # the user's matplotlibrc would change the page
        matplotlib.rcParams.update(style(name))
        figure = Figure([side / POINTS_AN_INCH for side in size], layout="constrained")
        paint(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return inline(out.getvalue(), size, title)


def style(name: str) -> dict[str, Any]:
    """Return the matplotlib settings: text as text, no frame, thin lines."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
        "savefig.transparent": True,
        "font.size": 9,
        "text.color": colour("ink"),
        "axes.edgecolor": colour("line"),
        "axes.labelcolor": colour("muted"),
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.titlecolor": colour("ink"),
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": colour("line"),
        "grid.linewidth": 0.6,
        "xtick.color": colour("muted"),
        "ytick.color": colour("muted"),
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "lines.linewidth": 1.6,
        "lines.markersize": 4.5,
        "errorbar.capsize": 2.5,
    }


def inline(svg: str, size: tuple[float, float], title: str) -> str:
    """Return an SVG file as an element of a page, without the ids of groups."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"#0a0b([0-9a-f]{2})", lambda found: f"var(--{NAMES[int(found[1], 16)]})", svg)
    head = f'<svg viewBox="0 0 {size[0]:g} {size[1]:g}" style="max-width: {1.25 * size[0]:g}px" role="img"'
    return re.sub(r"<svg[^>]*>", lambda _: f'{head} aria-label="{escape(title)}">', svg, count=1).strip() + "\n"


def name_lines(axes: Any, ends: list[tuple[float, str, str]]) -> None:
    """Write the name of each line at its right end, moved apart if they overlap; ends: (height, name, colour)."""
    low, high = axes.get_ylim()
    heights = [(height - low) / (high - low) for height, _, _ in ends]
    points = axes.get_figure().get_size_inches()[1] * POINTS_AN_INCH
    for height, (_, name, hue) in zip(spread(heights, 14 / points), ends, strict=True):
        axes.annotate(
            name, (1, height), (6, 0), xycoords="axes fraction", textcoords="offset points",
            va="center", color=colour(hue), fontsize=8.5, annotation_clip=False,
        )  # fmt: skip


def spread(places: list[float], gap: float) -> list[float]:
    """Return positions from 0 to 1, moved apart to distances of at least `gap`, in the same order."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for _ in range(200):
        touching = [(a, b) for a, b in zip(order, order[1:], strict=False) if moved[b] - moved[a] < gap - 1e-9]
        for a, b in touching:
            middle = (moved[a] + moved[b]) / 2
            moved[a], moved[b] = middle - gap / 2, middle + gap / 2
        if not touching:
            break
    return moved
