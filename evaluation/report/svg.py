"""Small SVG charts, drawn as text so that the page needs neither a library nor a file beside it."""

import html
import math
from collections.abc import Sequence

COLORS = ("#475569", "#c2410c", "#15803d", "#7c3aed", "#2457d6", "#b91c1c", "#0e7490", "#a16207")


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    step = min((m * 10 ** math.floor(math.log10(raw)) for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """The range of the values and a little more on both sides, never empty."""
    low, high = min(values), max(values)
    pad = share * (high - low) or share * abs(high) or 1.0
    return low - pad, high + pad


def text(x: float, y: float, content: str, css: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}">{html.escape(content)}</text>'


def stroke(x1: float, y1: float, x2: float, y2: float, rest: str = 'class="g"') -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {rest}/>'


def drawing(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    label = html.escape(title)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def line_chart(title: str, x: Sequence[float], y: Sequence[float], color: str = COLORS[4], width: int = 340, height: int = 170) -> str:
    """One curve over steps. Points that are not finite are left out; raises ValueError when none is left."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    left, right, top, bottom = 46, width - 10, 26, height - 22
    x0, x1 = min(a for a, _ in points), max(a for a, _ in points)
    y0, y1 = padded([b for _, b in points])

    def across(a: float) -> float:
        return left + (a - x0) / ((x1 - x0) or 1) * (right - left)

    def down(b: float) -> float:
        return bottom - (b - y0) / (y1 - y0) * (bottom - top)

    parts = [text(left, 15, title, "t")]
    for tick in ticks(y0, y1):
        parts += [stroke(left, down(tick), right, down(tick)), text(left - 6, down(tick) + 3.5, f"{tick:g}", "a e")]
    parts += [text(across(tick), height - 6, f"{tick:g}", "a m") for tick in ticks(x0, x1)]
    path = " ".join(f"{across(a):.1f},{down(b):.1f}" for a, b in points)
    parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6" stroke-linejoin="round"/>')
    return drawing(title, width, height, parts)


def interval_chart(title: str, rows: Sequence[tuple[str, dict[str, float], str]], width: int = 260) -> str:
    """A dot and its interval for each row (name, {mean, lo, hi}, colour)."""
    left, right, top, step = 92, width - 14, 30, 24
    height = top + step * len(rows) + 24
    low, high = padded([value[end] for _, value, _ in rows for end in ("lo", "hi")])

    def across(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    parts = [text(0, 15, title, "t")]
    for tick in ticks(low, high, 3):
        parts += [stroke(across(tick), top - 6, across(tick), height - 20), text(across(tick), height - 6, f"{tick:g}", "a m")]
    for i, (name, value, color) in enumerate(rows):
        y = top + step * i + 6
        told = f"{value['mean']:.3f} [{value['lo']:.3f}, {value['hi']:.3f}]"
        parts.append(text(left - 8, y + 4, name, "a e"))
        parts.append(stroke(across(value["lo"]), y, across(value["hi"]), y, f'stroke="{color}" stroke-width="2"'))
        parts.append(f'<circle cx="{across(value["mean"]):.1f}" cy="{y}" r="4" fill="{color}"><title>{told}</title></circle>')
    return drawing(title, width, height, parts)
