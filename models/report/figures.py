"""Pictures of a report, drawn twice: for a light page and for a dark one. They need matplotlib."""

import base64
import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SMALL = (4.6, 3.0)
"""Inches: as wide as a phone, so that text keeps its size there."""
Theme = Mapping[str, Any]
THEMES: tuple[Theme, Theme] = (
    {"ink": "#334155", "grid": "#94a3b8", "cycle": ["#0f766e", "#c2410c", "#4f46e5", "#a16207", "#be185d"]},
    {"ink": "#cbd5e1", "grid": "#475569", "cycle": ["#2dd4bf", "#fb923c", "#a5b4fc", "#facc15", "#f472b6"]},
)


LEAST_RATIO = 1e-3


class FiguresError(ValueError):
    """Raised where matplotlib is missing. The message says how to install it."""


def picture(draw: Callable[[Any], None], alt: str, size: tuple[float, float] = SMALL) -> str:
    """HTML of what `draw` draws into a matplotlib figure. Raises FiguresError without matplotlib."""
    light = _svg(draw, size, THEMES[0])
    # What is drawn as pixels has its colours in their bytes; all else is the light picture in other colours.
    dark = _svg(draw, size, THEMES[1]) if "<image" in light else recoloured(light)
    light, dark = (f"data:image/svg+xml;base64,{base64.b64encode(it.encode()).decode()}" for it in (light, dark))
    return (
        f"<picture><source media='(prefers-color-scheme: dark)' srcset='{dark}'>"
        f"<img alt='{html.escape(alt, quote=True)}' src='{light}'></picture>"
    )


def _svg(draw: Callable[[Any], None], size: tuple[float, float], theme: Theme) -> str:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FiguresError("a report needs matplotlib: pip install 'fullrank-server[report]'") from error
    with matplotlib.rc_context(_style(matplotlib, theme)):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", dpi=150, transparent=True, metadata={"Date": None})
    return file.getvalue()


def recoloured(svg: str) -> str:
    """The picture for a dark page, from the one for a light page: drawing it again would take as long as the first."""
    light, dark = ([theme["ink"], theme["grid"], *theme["cycle"]] for theme in THEMES)
    colours = dict(zip(light, dark, strict=True))
    return re.sub("|".join(light), lambda found: colours[found[0]], svg)


def _style(matplotlib: Any, theme: Theme) -> Any:
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(inked, theme["ink"]),
        "axes.prop_cycle": matplotlib.cycler(color=theme["cycle"]),
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "axes.titlesize": 10,
        "grid.color": theme["grid"],
        "grid.alpha": 0.35,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "svg.hashsalt": "fullrank",
    }


def spectrum(curves: Mapping[str, Sequence[float]], title: str) -> str:
    """Eigenvalues by rank, both logarithmic. A curve ends where its eigenvalues are rounding.

    Where all rows are one point there is no variance, and nothing to take a logarithm of.
    """
    scale = "log" if any(max(values, default=0.0) > 0 for values in curves.values()) else "linear"

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for style, (name, values) in zip(("-", "--", ":", "-."), curves.items(), strict=False):
            floor = max(values, default=0.0) * 1e-9
            kept = [value if value > floor else math.nan for value in values]
            axes.plot(range(1, len(kept) + 1), kept, style, label=name, linewidth=1.8)
        axes.set(xscale="log", yscale=scale, xlabel="rank of the direction", ylabel="variance in it", title=title)
        axes.legend()

    names = " and ".join(curves)
    return picture(draw, f"Eigenvalue spectrum of {names}, logarithmic in rank and variance")


def bands(found: Sequence[Mapping[str, Any]], limits: Mapping[str, float | None], title: str) -> str:
    """The variance in each band of the reference's directions over the reference's, with bounds and thresholds."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        middle, lower, upper = zip(*(_bar(band["ratio"]) for band in found), strict=True)
        axes.errorbar(range(len(found)), middle, yerr=(lower, upper), fmt="o", capsize=3, label="now, 95 % bounds")
        axes.axhline(1.0, color="C0", linewidth=1, linestyle="--", label="reference")
        for key, words in (("tail_energy_ratio_low", "tail: low"), ("tail_energy_ratio_high", "tail: high")):
            if (limit := limits.get(key)) is not None:
                axes.axhline(limit, color="C1", linewidth=1, linestyle=":", label=words)
        names = [f"{it['first']}–{it['last']}" if it["first"] != it["last"] else str(it["first"]) for it in found]
        axes.set_xticks(range(len(found)), names, rotation=45, fontsize=8)
        axes.set(yscale="log", xlabel="directions", ylabel="variance / reference", title=title)
        axes.legend(fontsize=8)

    return picture(draw, "Variance in bands of the reference's directions, as a ratio to the reference")


def _bar(value: Mapping[str, float | None]) -> tuple[float, float, float]:
    """The height of a bar and how far its bounds reach below and above, for a logarithmic axis; 0 if unknown."""
    low, middle, high = (value[it] for it in ("lower", "estimate", "upper"))
    height = middle if middle is not None and middle > LEAST_RATIO else LEAST_RATIO
    below = height - max(low, LEAST_RATIO) if low is not None and math.isfinite(low) else 0.0
    above = high - height if high is not None and math.isfinite(high) else 0.0
    return height, max(0.0, below), max(0.0, above)


def overlaps(found: Mapping[int, Any], title: str) -> str:
    """The share of nearest neighbours that stay, by their number."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        bars = (_bar(vars(it)) for it in found.values())
        values, lower, upper = zip(*bars, strict=True)
        axes.bar([str(k) for k in found], values, yerr=(lower, upper), capsize=3, width=0.6, ecolor="0.5")
        axes.set(ylim=(0, 1), xlabel="nearest neighbours k", ylabel="share that stays", title=title)

    return picture(draw, "Share of nearest neighbours that both encoders find")


def distances(first: Sequence[float], second: Sequence[float], names: tuple[str, str], title: str) -> str:
    """Cosines of the same pairs of images in both encoders."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.scatter(second, first, s=4, alpha=0.25, linewidths=0, rasterized=True)
        axes.set(xlabel=f"cosine in {names[1]}", ylabel=f"cosine in {names[0]}", title=title)

    return picture(draw, f"Cosines of pairs of images: {names[0]} against {names[1]}")
