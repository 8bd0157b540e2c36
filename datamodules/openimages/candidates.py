"""Which masks may become subjects, as far as the annotation files tell: joined, filtered, counted, in the seed's order."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from datamodules.openimages.config import SelectConfig
from datamodules.openimages.hierarchy import class_names, descendants, label_of
from moma_lightning.files import write_beside, write_json

MASK_NAME = re.compile(r"[0-9a-f]{16}_[A-Za-z0-9_]+_[A-Za-z0-9]+\.png")
ROWS_AT_ONCE = 256  # rows of a Parquet row group: what whoever merges the digits' files holds of each in memory
MASK_BOX, BOX = ["BoxXMin", "BoxXMax", "BoxYMin", "BoxYMax"], ["XMin", "XMax", "YMin", "YMax"]


class Funnel:
    """Rows and what became of them: every row that goes is counted under one named reason."""

    def __init__(self, rows: pd.DataFrame):
        self.rows, self.reasons = rows, Counter[str]()

    def drop(self, reason: str, gone: pd.Series | np.ndarray | list[bool]) -> None:
        gone = np.asarray(gone, bool)
        self.reasons[reason] += int(gone.sum())
        self.rows = self.rows[~gone]


class JoinDigit:
    """A stage: item {"digit"} -> counts by reason, and `<folder>/<digit>.parquet` of the candidates in the seed's order."""

    def __init__(self, tables: Path, folder: Path, hierarchy: Path, classes: Path, select: SelectConfig, seed: int):
        self.tables, self.folder, self.select, self.seed = tables, folder, select, seed
        self.names = class_names(classes)
        self.humans = human_classes(hierarchy, select)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        path = self.folder / f"{item['digit']}.parquet"
        counts = path.with_suffix(".json")
        if not counts.exists():
            tables = {kind: pd.read_parquet(self.tables / kind / path.name) for kind in ("masks", "boxes", "image_labels", "metadata")}
            tables["bad"] = pd.concat(pd.read_parquet(self.tables / kind / "bad.parquet") for kind in tables)
            captions = self.tables / "captions" / path.name
            given = pd.read_parquet(captions) if captions.exists() else None
            funnel = join(tables, given, self.names, self.humans, self.select)
            rows = ordered(funnel.rows, self.seed)
            write_beside(path, lambda beside: rows.to_parquet(beside, index=False, row_group_size=ROWS_AT_ONCE))
            write_json(counts, funnel.reasons)
        return item | {"reasons": json.loads(counts.read_text())}


def human_classes(hierarchy: Path, select: SelectConfig) -> frozenset[str]:
    if select.humans == "keep":
        return frozenset()
    return descendants(hierarchy, select.human_roots) | frozenset(select.more_human_classes)


def join(tables: dict[str, pd.DataFrame], captions: pd.DataFrame | None, names: dict[str, str], humans: frozenset[str],
         select: SelectConfig) -> Funnel:
    """Masks with their class name, box flags, metadata and given caption; the order of the filters is the funnel's."""
    masks, boxes = tables["masks"], tables["boxes"]
    funnel = Funnel(masks)
    funnel.drop("malformed_mask_path", [not _is_mask_name(*row) for row in masks[["MaskPath", "ImageID"]].itertuples(index=False)])
    funnel.drop("duplicate_row", funnel.rows.duplicated("MaskPath"))
    funnel.drop("unknown_class", ~funnel.rows.LabelName.isin(list(names)))
    if select.classes is not None:
        funnel.drop("class_not_chosen", ~_is_one_of(funnel.rows.LabelName, select.classes, names))
    funnel.drop("class_excluded", _is_one_of(funnel.rows.LabelName, select.exclude_classes, names))
    funnel.drop("human_subject", funnel.rows.LabelName.isin(humans))
    if select.humans == "picture":
        funnel.drop("human_in_picture", funnel.rows.ImageID.isin(pictures_with(humans, tables, select)))
    funnel.rows = with_box(funnel.rows, boxes[boxes.ImageID.isin(funnel.rows.ImageID)], select.box_tolerance)
    if select.require_box:
        funnel.drop("no_box", funnel.rows.XMin.isna())
    for reason, flag, wanted in (("group_of", "IsGroupOf", select.group_of), ("depiction", "IsDepiction", select.depiction),
                                 ("inside", "IsInside", select.inside)):
        funnel.drop(reason, (funnel.rows[flag] == 1) & (not wanted))
    funnel.drop("low_predicted_iou", funnel.rows.PredictedIoU < select.min_predicted_iou)
    sides = funnel.rows[MASK_BOX].to_numpy()
    funnel.drop("box_too_small", (sides[:, 1] - sides[:, 0]) * (sides[:, 3] - sides[:, 2]) < select.min_area)
    rows = funnel.rows.merge(tables["metadata"].drop_duplicates("ImageID"), on="ImageID", how="left", indicator="has_metadata")
    funnel.rows = rows
    funnel.drop("no_metadata", rows.has_metadata == "left_only")
    labels = {class_id: label_of(name) for class_id, name in names.items()}
    funnel.rows = funnel.rows.drop(columns="has_metadata").assign(label=funnel.rows.LabelName.map(labels), given_caption=None)
    if captions is not None:
        found = captions.drop_duplicates("ImageID").set_index("ImageID").caption
        funnel.rows["given_caption"] = funnel.rows.ImageID.map(found)
        funnel.drop("no_caption", funnel.rows.given_caption.isna())
    return funnel


def pictures_with(humans: frozenset[str], tables: dict[str, pd.DataFrame], select: SelectConfig) -> set[str]:
    """ImageIDs in which a mask, a box or an image-level label, be its row good or bad, says that there is a person or a part of one."""
    labels = tables["image_labels"]
    seen = labels[labels.Confidence >= select.min_label_confidence]
    return set().union(*(table.ImageID[table.LabelName.isin(humans)] for table in (tables["masks"], tables["boxes"], seen, tables["bad"])))


def with_box(masks: pd.DataFrame, boxes: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """Each mask with the nearest box of its picture and class: masks name no box, they repeat its corners."""
    pairs = masks[["MaskPath", "ImageID", "LabelName", *MASK_BOX]].merge(boxes, on=["ImageID", "LabelName"])
    pairs["distance"] = np.abs(pairs[MASK_BOX].to_numpy() - pairs[BOX].to_numpy()).max(1, initial=0)
    nearest = pairs[pairs.distance <= tolerance].sort_values("distance", kind="stable").drop_duplicates("MaskPath")
    return masks.merge(nearest[["MaskPath", *BOX, "IsGroupOf", "IsDepiction", "IsInside"]], on="MaskPath", how="left")


def ordered(candidates: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Rows by `order`, a digest of seed and ImageID, the same whatever was read first; masks of a picture together, by name."""
    digests = [hashlib.sha256(f"{seed} {image}".encode()).digest() for image in candidates.ImageID]
    return candidates.assign(order=digests).sort_values(["order", "MaskPath"])


def _is_mask_name(path: str, image_id: str) -> bool:
    return path.startswith(image_id + "_") and MASK_NAME.fullmatch(path) is not None


def _is_one_of(ids: pd.Series, wanted: list[str], names: dict[str, str]) -> pd.Series:
    """By class id or name, in any case. Raises ValueError for a class that is not among the names."""
    lower = {name.lower(): i for i, name in names.items()}
    unknown = [w for w in wanted if w not in names and w.lower() not in lower]
    if unknown:
        raise ValueError(f"select: no classes of the names {unknown}")
    return ids.isin([w if w in names else lower[w.lower()] for w in wanted])
