"""What pages are made of: templates, and figures drawn by matplotlib as SVG in the colours of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

INK = "#010203"
"""Stands for the colour of the page's text, which is another one in the dark."""
COLOURS = ("#2b7fc4", "#d1600f", "#1a9850", "#b04ab0", "#8f7d1b", "#d0405f", "#6b7d8a")
"""Of curves; at least 3 : 1 against white and against the dark background."""
MARKERS = "osD^vP*"


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure: its title, what it shows in words, and its SVG."""

    title: str
    words: str
    svg: str


def figure(title: str, words: str, draw: Callable[[Any], None], *, panels: int = 1) -> Figure:
    """Draw a figure.

    Args:
        words: what is seen, for those who do not see it.
        draw: gets the axes, or an array of `panels` axes beside each other.
    """
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure as Canvas

    style: Any = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
        "axes.prop_cycle": cycler(color=COLOURS), "axes.spines.top": False, "axes.spines.right": False,
        "font.size": 11, "svg.hashsalt": title, "axes.grid": True, "grid.alpha": 0.25, "grid.color": INK,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=(5.4 if panels == 1 else 3.5 * panels, 4.1), layout="constrained")
        axes = canvas.subplots(1, panels)
        draw(axes)
        first = axes if panels == 1 else axes[0]
        handles, labels = first.get_legend_handles_labels()
        if handles:
            canvas.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=10, frameon=False)
        out = io.StringIO()
        canvas.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    svg = out.getvalue()[out.getvalue().index("<svg") :]
    # Several figures share a page, so their ids must not meet.
    own = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", svg)
    return Figure(title, words, svg.replace(INK, "currentColor"))


def render(template: str, **values: Any) -> str:
    """A page. Names in it come from other people's files, so everything is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("iir_dist.report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template).render(**values)
