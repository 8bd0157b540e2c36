"""Is M_gen where the subject is? IoU of the mask read off the label's attention with the subject that SAM finds in the picture.

The number behind Figure 9: with masking the maps stay on the subject, without it they spread (paper section 4.2).
"""

import logging
from typing import Any

import numpy as np
import torch
from PIL import Image

from evaluation.config import EvalConfig
from evaluation.extra_scores import Judges
from evaluation.made_with import about_table, weights_at
from evaluation.methods import Moma
from evaluation.metrics import Masker
from evaluation.plan import Evaluation
from evaluation.protocols import preset
from evaluation.stamps import load_picture
from evaluation.statistics import draws, interval
from evaluation.studio import STRENGTHS, Studio, mask_path
from evaluation.tables import markdown, protocol_line, signed_interval, with_interval
from moma_lightning.files import write_bytes, write_json
from moma_lightning.models.masks import resize_mask

logger = logging.getLogger(__name__)


def run_mask_iou(config: EvalConfig) -> dict[str, Any]:
    """Write `<run>/ablations/mask_iou.{json,md}` and return the summary: mean IoU over subjects at each mask strength, one picture of each context prompt.

    With paired differences, and how often SAM finds nothing.
    """
    evaluation = Evaluation.open(config, config.resolved_device())
    protocol = evaluation.protocol
    judges = Judges(protocol, {}, Masker.from_pretrained(protocol.segmenter, config.eval_folder / "cache", config.resolved_device()))
    studio = Studio(evaluation, config.ablations_folder / "mask_iou")
    methods = {f"mask {strength:g}": Moma(mask_strength=strength) for strength in STRENGTHS}
    values = {name: subject_ious(studio, judges, method) for name, method in methods.items()}
    summary = summarise_ious(values)
    about = about_table(config, "Is M_gen where the subject is?", methods)
    about["made_with"]["judges"] = {"segmenter": weights_at(protocol.segmenter)}
    rows = [[name, with_interval(summary[name]), str(summary[name]["without_subject"])] for name in values]
    lines = markdown(["Masking", "IoU of M_gen(0) with SAM's subject", "pictures without a subject"], rows)
    pairs = [[f"{row['a']} - {row['b']}", signed_interval(row)] for row in summary["differences"]]
    page = [f"# {about['title']}\n", protocol_line(protocol, preset(config.protocol), len(evaluation.subjects)) + "\n",
            f"Here one picture of each context prompt, of the first reference; `{protocol.segmenter}` alone judges.\n",
            lines, markdown(["Difference", "IoU"], pairs)]
    write_json(config.ablations_folder / "mask_iou.json", about | summary)
    write_bytes(config.ablations_folder / "mask_iou.md", "\n".join(page).encode())
    logger.info("%s", lines)
    return summary


def subject_ious(studio: Studio, judges: Judges, method: Moma) -> list[list[float]]:
    """IoUs of each subject's pictures."""
    found = []
    for subject in studio.evaluation.subjects:
        plans = [plan for plan in studio.plans(f"strength{method.mask_strength:g}", method, subject) if plan.task.kind == "context"]
        studio.make(method, subject, plans, with_masks=True)
        found.append([mask_iou(Image.open(mask_path(plan.path)), judges.mask(load_picture(plan.path))) for plan in plans])
    return found


def mask_iou(generated: Image.Image, subject: np.ndarray) -> float:
    """IoU of M_gen > 1/2 with the subject's mask, at M_gen's own resolution; NaN where SAM found nothing.

    generated: grey levels of M_gen. subject: bool [height, width].
    """
    if not subject.any():
        return float("nan")
    mask = np.asarray(generated) > 127
    true = resize_mask(torch.from_numpy(subject)[None, None].float(), mask.shape)[0, 0].numpy() > 0.5
    union = (mask | true).sum()
    return float((mask & true).sum() / union) if union else 0.0


def summarise_ious(values: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Means over subjects with bootstrap intervals, `without_subject` (pictures whose IoU is NaN: they count as 0), and paired differences."""
    means = {name: np.array([np.nan_to_num(ious).mean() for ious in per_subject]) for name, per_subject in values.items()}
    drawn = draws(len(next(iter(means.values()))))
    summary: dict[str, Any] = {
        name: interval(mean.mean(), mean[drawn].mean(1)) | {"without_subject": sum(int(np.isnan(ious).sum()) for ious in values[name])}
        for name, mean in means.items()
    }
    first, *others = means
    pairs = [(first, other, means[first] - means[other]) for other in others]
    summary["differences"] = [{"a": a, "b": b, **interval(d.mean(), d[drawn].mean(1))} for a, b, d in pairs]
    return summary
