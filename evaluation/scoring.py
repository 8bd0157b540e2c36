"""Scoring: pictures -> one row of DINO, CLIP-I and CLIP-T each."""

import logging
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd

from evaluation.methods import Method
from evaluation.metrics import CachedEncoder, SubjectSimilarity, TextAlignment, build_encoders
from evaluation.plan import Evaluation, Planned
from evaluation.stamps import load_picture

logger = logging.getLogger(__name__)

SCORES = ("dino", "clip_i", "clip_t")


def score(evaluation: Evaluation, methods: dict[str, Method], encoders: dict[str, CachedEncoder] | None = None) -> pd.DataFrame:
    """One row a picture, every method. Raises ValueError where pictures are missing: a mean over a part is another number."""
    if encoders is None:
        protocol, config = evaluation.protocol, evaluation.config
        encoders = build_encoders(protocol.dino, protocol.clip, config.eval_folder / "cache", config.resolved_device())
    frames = []
    for name, method in methods.items():
        rows = oracle_rows(evaluation, encoders) if method.is_oracle else generated_rows(evaluation, name, method, encoders)
        if not rows:
            raise ValueError(f"{name}: no subject has two pictures, so there are no real pictures to compare to each other")
        frames.append(pd.DataFrame(rows).assign(method=name))
        for encoder in encoders.values():
            encoder.save()
        logger.info("%s: %d pictures scored", name, len(rows))
    table = pd.concat(frames, ignore_index=True)
    table = table.assign(protocol=evaluation.protocol.name, protocol_digest=evaluation.protocol.digest)
    first = ["method", "subject", "label", "prompt_kind", "prompt", *SCORES, "path", "reference"]
    return table[[*first, *(column for column in table.columns if column not in first)]]


def oracle_rows(evaluation: Evaluation, encoders: dict[str, CachedEncoder]) -> list[dict[str, Any]]:
    """Each real picture against the others of its subject: what a perfect method could reach (DreamBooth, Table 1)."""
    rows = []
    for subject in evaluation.subjects:
        if len(subject.images) < 2:
            logger.warning("%s has one picture: it is left out of the real pictures' score", subject.name)
            continue
        pictures = [load_picture(path) for path in subject.images]
        metrics = {"dino": SubjectSimilarity(encoders["dino"]), "clip_i": SubjectSimilarity(encoders["clip"])}
        for i, picture in enumerate(pictures):
            for metric in metrics.values():
                metric.update([picture], pictures[:i] + pictures[i + 1 :])
        values = {name: metric.per_picture().tolist() for name, metric in metrics.items()}
        for i, path in enumerate(subject.images):
            rows.append(
                {
                    "subject": subject.name,
                    "label": subject.label,
                    "prompt_kind": "real",
                    "prompt": "",
                    "path": str(path),
                    "reference": "",
                    "reference_index": i,
                    "prompt_index": 0,
                    "picture": 0,
                    "seed": -1,
                    "clip_t": np.nan,
                }
                | {name: values[name][i] for name in values}
            )
    return rows


def generated_rows(evaluation: Evaluation, name: str, method: Method, encoders: dict[str, CachedEncoder]) -> list[dict[str, Any]]:
    plans = evaluation.planned(name, method)
    refuse_missing(name, plans)
    real = {subject.name: subject.images for subject in evaluation.subjects}
    rows = []
    for _, group in groupby(plans, key=lambda plan: (plan.task.subject, plan.task.reference, plan.task.kind)):
        same = list(group)
        compared = comparison(evaluation.protocol.comparison, real[same[0].task.subject], same[0].task.reference)
        for start in range(0, len(same), 64):
            rows += scored_rows(same[start : start + 64], compared, evaluation, encoders)
    return rows


def scored_rows(
    plans: list[Planned], compared: list, evaluation: Evaluation, encoders: dict[str, CachedEncoder]
) -> list[dict[str, Any]]:
    """Rows of pictures of one reference and kind. Texture prompts change the subject's look: CLIP-T only (paper, Table 1)."""
    pictures, tasks = [load_picture(plan.path) for plan in plans], [plan.task for plan in plans]
    clip_t = TextAlignment(encoders["clip"], evaluation.protocol.text_template, evaluation.protocol.clip_t_scale)
    clip_t.update(pictures, [task.prompt for task in tasks])
    scores = {"clip_t": clip_t.per_picture().tolist(), "dino": [np.nan] * len(plans), "clip_i": [np.nan] * len(plans)}
    if tasks[0].kind == "context":
        real = [load_picture(path) for path in compared]
        for key, encoder in (("dino", encoders["dino"]), ("clip_i", encoders["clip"])):
            metric = SubjectSimilarity(encoder)
            metric.update(pictures, real)
            scores[key] = metric.per_picture().tolist()
    return [
        {
            "subject": task.subject,
            "label": task.label,
            "prompt_kind": task.kind,
            "prompt": task.prompt,
            "path": str(plan.path),
            "reference": str(plan.reference.path),
            "reference_index": task.reference,
            "prompt_index": task.prompt_index,
            "picture": task.picture,
            "seed": task.seed,
        }
        | {key: values[i] for key, values in scores.items()}
        for i, (plan, task) in enumerate(zip(plans, tasks, strict=True))
    ]


def comparison(kind: str, real: list, reference: int) -> list:
    """The real pictures that a picture made from number `reference` is compared to."""
    if kind == "input":
        return [real[reference]]
    return [path for i, path in enumerate(real) if kind == "all" or i != reference]


def refuse_missing(name: str, plans: list[Planned]) -> None:
    missing = [plan.path for plan in plans if not plan.is_done]
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} of {len(plans)} pictures are missing, cut short or made with other settings "
            f"(the first is {missing[0]}); run `python -m evaluation generate` with the same config"
        )
