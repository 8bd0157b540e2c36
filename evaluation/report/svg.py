"""Small SVG charts, drawn as text so that the page needs neither a library nor a file beside it."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

COLORS = ("#2457d6", "#c2410c", "#15803d", "#7c3aed", "#b91c1c", "#0e7490", "#a16207", "#475569")


@dataclass
class Line:
    name: str
    x: Sequence[float]
    y: Sequence[float]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    step = min((m * 10 ** math.floor(math.log10(raw)) for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(title: str, line: Line, color: str = COLORS[0], width: int = 340, height: int = 170) -> str:
    """One curve over steps. Points that are not finite are left out."""
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    left, right, top, bottom = 46, 10, 26, 22
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    pad = 0.05 * (y1 - y0) or 0.05 * abs(y1) or 1
    y0, y1 = y0 - pad, y1 + pad

    def at(x: float, y: float) -> tuple[float, float]:
        return (left + (x - x0) / ((x1 - x0) or 1) * (width - left - right), height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom))

    parts = [f'<text x="{left}" y="15" class="t">{html.escape(title)}</text>']
    for tick in ticks(y0, y1):
        y = at(x0, tick)[1]
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" class="g"/><text x="{left - 6}" y="{y + 3.5:.1f}" class="a e">{tick:g}</text>')
    for tick in ticks(x0, x1):
        parts.append(f'<text x="{at(tick, y0)[0]:.1f}" y="{height - 6}" class="a m">{tick:g}</text>')
    path = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in points)
    parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6" stroke-linejoin="round"/>')
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'


def interval_chart(title: str, rows: Sequence[tuple[str, dict[str, float]]], width: int = 340, zero: bool = False) -> str:
    """A dot and its interval for each row; with `zero`, the line of no difference."""
    left, right, top, step = 118, 14, 30, 24
    height = top + step * len(rows) + 24
    low, high = min(v["lo"] for _, v in rows), max(v["hi"] for _, v in rows)
    if zero:
        low, high = min(low, 0), max(high, 0)
    pad = 0.06 * (high - low) or 0.01
    low, high = low - pad, high + pad

    def at(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - right)

    parts = [f'<text x="0" y="15" class="t">{html.escape(title)}</text>']
    for tick in ticks(low, high, 3):
        kind = "z" if zero and tick == 0 else "g"
        parts.append(f'<line x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="{top - 6}" y2="{height - 20}" class="{kind}"/>'
                     f'<text x="{at(tick):.1f}" y="{height - 6}" class="a m">{tick:g}</text>')
    for i, (name, value) in enumerate(rows):
        y, color = top + step * i + 6, COLORS[i % len(COLORS)] if not zero else COLORS[0]
        parts.append(f'<text x="{left - 8}" y="{y + 4}" class="a e">{html.escape(name)}</text>'
                     f'<line x1="{at(value["lo"]):.1f}" x2="{at(value["hi"]):.1f}" y1="{y}" y2="{y}" stroke="{color}" stroke-width="2"/>'
                     f'<circle cx="{at(value["mean"]):.1f}" cy="{y}" r="4" fill="{color}"><title>{value["mean"]:.3f} [{value["lo"]:.3f}, {value["hi"]:.3f}]</title></circle>')
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
