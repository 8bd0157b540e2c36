"""Markdown tables in the form of the paper's Table 1."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evaluation import published
from evaluation.protocols import Protocol, changes
from evaluation.statistics import ENOUGH_SUBJECTS, LEVEL, METRICS, TABLE_1, Interval, by_chance, leaves_out_zero
from moma_lightning.dotted import flat


def with_interval(value: Interval | None) -> str:
    return f"{value['mean']:.3f} [{value['lo']:.3f}, {value['hi']:.3f}]" if value else "-"


def signed_interval(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:+.3f} [{value['lo']:+.3f}, {value['hi']:+.3f}]"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def shown(summary: dict[str, Any]) -> list[str]:
    """Metrics of a table: the paper's four, then what else any method has."""
    methods = [metrics for name, metrics in summary.items() if name != "differences"]
    return [m for m in METRICS if m in TABLE_1 or any(m in metrics for metrics in methods)]


def method_table(summary: dict[str, Any]) -> str:
    columns = shown(summary)
    rows = [[name, *(with_interval(metrics.get(m)) for m in columns)] for name, metrics in summary.items() if name != "differences"]
    return markdown(["Method", *(METRICS[m].title for m in columns)], rows)


def difference_table(summary: dict[str, Any]) -> str:
    """A row a pair, a column a metric; bold where the interval leaves out zero, and a line on how many would be bold by chance."""
    columns = shown(summary)
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for row in summary["differences"]:
        text = signed_interval(row)
        pairs.setdefault((row["a"], row["b"]), {})[row["metric"]] = f"**{text}**" if leaves_out_zero(row) else text
    table = markdown(
        ["Difference", *(METRICS[m].title for m in columns)],
        [[f"{a} - {b}", *(cells.get(m, "-") for m in columns)] for (a, b), cells in pairs.items()],
    )
    return f"{table}\nBold: {by_chance(summary['differences'])}\n"


def published_table(rows: Mapping[Any, Sequence[float | None]], first: str = "Method") -> str:
    return markdown(
        [first, *(METRICS[m].title for m in TABLE_1)],
        [[str(name), *("-" if v is None else f"{v:.3f}" for v in values)] for name, values in rows.items()],
    )


def protocol_line(protocol: Protocol, before: Protocol, subjects: int) -> str:
    """What a table was made by; before: the preset that `protocol` is, or was changed from."""
    sampler = protocol.sampler
    references = protocol.references if isinstance(protocol.references, str) else "listed"
    return (
        f"Protocol `{protocol.name}`, digest `{protocol.digest}`: {subjects} subjects, {references} reference, "
        f"compared to {protocol.comparison} real pictures, {protocol.pictures_per_prompt} a prompt, {sampler.num_inference_steps} steps, "
        f"guidance {sampler.guidance_scale:g}, seed {sampler.seed}; DINO `{protocol.dino.model}`, "
        f"CLIP `{protocol.clip.model}`{changed_fields(protocol, before)}. Brackets: {LEVEL:.0%} bootstrap interval over subjects{of_few(subjects)}."
    )


def of_few(subjects: int) -> str:
    return f" (of fewer than {ENOUGH_SUBJECTS} too narrow, and none in bold)" if subjects < ENOUGH_SUBJECTS else ""


def changed_fields(protocol: Protocol, before: Protocol) -> str:
    """What a modified preset has otherwise than the preset."""
    listed = [f"`{name}: {json.dumps(value)}`" for name, value in flat(changes(protocol, before)).items() if name != "name"]
    return f"; other than the preset's: {', '.join(listed)}" if listed else ""


def score_page(summary: dict[str, Any], protocol: Protocol, before: Protocol, subjects: int, warnings: Sequence[str]) -> str:
    """table.md: ours first, then differences, then the published rows in a section of their own."""
    parts = ["# Scores\n", protocol_line(protocol, before, subjects) + "\n", method_table(summary)]
    parts += [f"> **Warning:** {warning}.\n" for warning in warnings]
    if summary["differences"]:
        parts += ["## Differences, paired over subjects\n", difference_table(summary)]
    parts += ["## The paper's Table 1\n", f"*{published.NOTE}.*\n", published_table(published.TABLE_1)]
    return "\n".join(parts)
