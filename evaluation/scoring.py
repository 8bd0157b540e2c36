"""Scoring: pictures -> one row of scores each."""

import logging
from itertools import groupby
from typing import Any

import pandas as pd
import torch

from datamodules.dreambooth import Subject
from evaluation.extra_scores import NEEDS_MASKS, Group, Judges, scores_of
from evaluation.methods import Method, Reference
from evaluation.metrics import Masker, build_encoders
from evaluation.oracle import check_oracle
from evaluation.plan import Evaluation, Planned
from evaluation.processes import Progress
from evaluation.stamps import load_pictures, read_stamp, refuse_black

logger = logging.getLogger(__name__)


def score(evaluation: Evaluation, methods: dict[str, Method], judges: Judges | None = None) -> pd.DataFrame:
    """One row a picture, every method. Raises ValueError where pictures are missing: a mean over a part is another number.

    Real pictures are scored first: what they score against each other says whether any other score can be believed.
    """
    protocol = evaluation.protocol
    judges = judges or open_judges(evaluation)
    frames: dict[str, pd.DataFrame] = {}
    progress = Progress(len(methods) * len(evaluation.subjects), what="subjects scored")
    for name in sorted(methods, key=lambda name: not methods[name].is_oracle):
        is_oracle = methods[name].is_oracle
        if not is_oracle:
            refuse_missing(name, evaluation.planned(name, methods[name]))
        rows = []
        for subject in evaluation.subjects:
            rows += subject_rows(evaluation, name, methods[name], subject, judges)
            judges.save_when_due()
            progress.add(name, 1)
        if not rows:
            raise ValueError(f"{name}: no subject has two pictures, so there are no real pictures to compare to each other")
        frames[name] = pd.DataFrame(rows).assign(method=name)
        judges.save()
        logger.info("%s: %d pictures scored%s", name, len(rows), without_subject(frames[name]))
        for sentence in check_oracle(frames[name], protocol, len(evaluation.subjects)) if is_oracle else ():
            logger.warning("!!! %s", sentence)
    if not methods:
        raise ValueError("the config names no methods to evaluate")
    table = pd.concat([frames[name] for name in methods], ignore_index=True)
    table = table.assign(protocol=protocol.name, protocol_digest=protocol.digest, aggregation=protocol.aggregation)
    first = ["method", "subject", "label", "prompt_kind", "prompt", *judges.columns, "path", "reference"]
    return table[[*first, *(column for column in table.columns if column not in first)]]


def open_judges(evaluation: Evaluation, part: int | None = None) -> Judges:
    """The protocol's encoders and, where a score needs it, its segmenter, with what they found in earlier runs. part: as in CachedEncoder."""
    protocol, cache, device = evaluation.protocol, evaluation.config.eval_folder / "cache", evaluation.config.resolved_device()
    needs_masks = not NEEDS_MASKS.isdisjoint(protocol.extra_scores)
    masker = Masker.from_pretrained(protocol.segmenter, cache, device) if needs_masks else None
    return Judges(protocol, build_encoders(protocol.encoders, cache, device, part), masker)


def subject_rows(evaluation: Evaluation, name: str, method: Method, subject: Subject, judges: Judges) -> list[dict[str, Any]]:
    """A row for each picture that a method has of a subject."""
    return oracle_rows(evaluation, subject, judges) if method.is_oracle else generated_rows(evaluation, name, method, subject, judges)


def oracle_rows(evaluation: Evaluation, subject: Subject, judges: Judges) -> list[dict[str, Any]]:
    """Each real picture against the others of its subject: what a perfect method could reach (DreamBooth, Table 1)."""
    if len(subject.images) < 2:
        return []
    rows = []
    pictures = real_pictures(evaluation, subject)
    for i, picture in enumerate(pictures):
        group = Group("real", [picture.image], [""], pictures[:i] + pictures[i + 1 :], own=(picture,))
        about = {
            "subject": subject.name,
            "label": subject.label,
            "prompt_kind": "real",
            "prompt": "",
            "path": str(picture.path),
            "reference": "",
            "reference_index": i,
            "prompt_index": 0,
            "picture": 0,
            "seed": -1,
            "picture_sha256": None,
        }
        rows.append(about | {score: values[0] for score, values in scores_of(group, judges).items()})
    return rows


def real_pictures(evaluation: Evaluation, subject: Subject) -> list[Reference]:
    return [evaluation.reference(subject, i) for i in range(len(subject.images))]


def generated_rows(evaluation: Evaluation, name: str, method: Method, subject: Subject, judges: Judges) -> list[dict[str, Any]]:
    real = real_pictures(evaluation, subject)
    per_prompt = evaluation.protocol.pictures_per_prompt
    at_once = max(1, 64 // per_prompt) * per_prompt  # whole prompts
    rows = []
    for _, group in groupby(evaluation.planned(name, method, [subject]), key=lambda plan: (plan.task.reference, plan.task.kind)):
        same = list(group)
        for start in range(0, len(same), at_once):
            rows += scored_rows(same[start : start + at_once], real, judges)
    return rows


def scored_rows(plans: list[Planned], real: list[Reference], judges: Judges) -> list[dict[str, Any]]:
    """Rows of pictures of one reference and kind. Raises ValueError, with their paths, for those that are all black."""
    tasks, protocol = [plan.task for plan in plans], judges.protocol
    pictures = load_pictures([plan.path for plan in plans], torch.get_num_threads())
    refuse_black({str(plan.path): picture for plan, picture in zip(plans, pictures, strict=True)})
    group = Group(
        tasks[0].kind,
        pictures,
        [task.prompt for task in tasks],
        comparison(protocol.comparison, real, tasks[0].reference),
        real[tasks[0].reference],
        tuple(comparison("others", real, tasks[0].reference)),
        protocol.pictures_per_prompt,
    )
    scores = scores_of(group, judges)
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
            "picture_sha256": (read_stamp(plan.path) or {}).get("sha256"),
        }
        | {key: values[i] for key, values in scores.items()}
        for i, (plan, task) in enumerate(zip(plans, tasks, strict=True))
    ]


def comparison(kind: str, real: list, reference: int) -> list:
    """The real pictures that a picture made from number `reference` is compared to."""
    if kind == "input":
        return [real[reference]]
    return [path for i, path in enumerate(real) if kind == "all" or i != reference]


def without_subject(rows: pd.DataFrame) -> str:
    """How many pictures SAM found no subject in: masked scores leave them out, so a method must not have many."""
    column = next((column for column in ("dino_masked", "clip_i_masked") if column in rows), None)
    if column is None:
        return ""
    count = (rows[column].isna() & ~rows["prompt_kind"].isin(["texture"])).sum()
    return f", {count} of them without a subject that SAM finds" if count else ""


def refuse_missing(name: str, plans: list[Planned]) -> None:
    missing = [plan.path for plan in plans if not plan.is_done]
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} of {len(plans)} pictures are missing, cut short or made with other settings "
            f"(the first is {missing[0]}); run `python -m evaluation generate` with the same config"
        )
