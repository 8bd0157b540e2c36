"""What people call things: methods, metrics, settings and prompts as a table or a figure writes them."""

import re
from collections.abc import Mapping
from typing import Any

from evaluation.statistics import METRICS

#: Names that plain spelling out would get wrong; the longest that fits the start of a key is used.
WORDS = {
    "real_images": "Real images",
    "text_only": "Text only",
    "ip_adapter": "IP-Adapter",
    "textual_inversion": "Textual Inversion",
    "dreambooth_lora": "DreamBooth LoRA",
    "blip_diffusion": "BLIP-Diffusion",
    "moma": "MoMA",
}
#: Axes of the ablations.
AXES = {
    "beta": "beta",
    "masking": "mask strength",
    "mask": "mask strength",
    "steps": "steps",
    "num_inference_steps": "steps",
    "guidance": "guidance",
    "guidance_scale": "guidance",
    "num_tokens": "tokens",
    "mask_threshold": "mask threshold",
}
#: A number at the end of a name.
NUMBER = re.compile(r"[-_ ]?(-?\d+(?:\.\d+)?)$")


def method_name(key: str) -> str:
    """`moma_beta1` -> `MoMA, beta 1`; a key of no known form is left as it is, with spaces for underscores."""
    start = max((word for word in WORDS if key == word or key.startswith(f"{word}_")), key=len, default=None)
    if start is None:
        return key.replace("_", " ")
    rest = key[len(start) + 1 :]
    return f"{WORDS[start]}, {setting_name(rest)}" if rest else WORDS[start]


def setting_name(key: str) -> str:
    """`masking0.5` -> `mask strength 0.5`; `no_init` -> `no init`."""
    number = NUMBER.search(key)
    if number is None:
        return axis_name(key)
    return f"{axis_name(key[: number.start()])} {number.group(1)}"


def axis_name(key: str) -> str:
    return AXES.get(key, key.replace("_", " "))


def metric_name(key: str) -> str:
    return METRICS[key].title


def column_of(metric: str) -> str:
    """The column of scores.parquet that a metric averages."""
    return METRICS[metric].column


def column_name(column: str) -> str:
    """CLIP-T rather than CLIP-T(c): a picture has one prompt."""
    return next(metric_name(metric).removesuffix("(c)") for metric in METRICS if column_of(metric) == column)


def methods_of(summary: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """The methods of a summary.json, or of an ablation's file: every entry that is a table of intervals."""
    return {name: cells for name, cells in summary.items() if isinstance(cells, dict) and all(is_interval(cell) for cell in cells.values())}


def is_interval(cell: Any) -> bool:
    return isinstance(cell, dict) and {"mean", "lo", "hi"} <= cell.keys()
