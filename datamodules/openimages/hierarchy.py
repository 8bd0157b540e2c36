"""The class hierarchy of `bbox_labels_600_hierarchy.json` and the classes' names."""

import csv
import json
import re
from pathlib import Path
from typing import Any


def descendants(hierarchy: Path, roots: list[str]) -> frozenset[str]:
    """The roots and all their subcategories and parts, wherever they stand in the tree. Raises ValueError for an unknown root."""
    try:
        tree = json.loads(hierarchy.read_text(encoding="utf-8"))
        found = {root: _below(tree, root) for root in roots}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{hierarchy} is not a class hierarchy (LabelName, Subcategory, Part): {error}") from error
    absent = [root for root, names in found.items() if not names]
    if absent:
        raise ValueError(f"{hierarchy}: the classes {absent} do not occur in it")
    return frozenset().union(*found.values())


def class_names(path: Path) -> dict[str, str]:
    """Class id to name, of a CSV with or without a header `LabelName,DisplayName`. Raises ValueError that names a bad file."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no file of class names, lines /m/...,name in UTF-8 ({error}): remove it, or name the right one in sources") from error
    names = {row[0]: row[1].strip() for row in rows if len(row) == 2 and row[0].startswith("/")}
    if not names:
        raise ValueError(f"{path}: no lines of the form /m/...,name")
    return names


def label_of(name: str) -> str:
    """A class's name as captions say it: in lower case, without what tells it from another in brackets at its end."""
    return re.sub(r"\s+\([^()]*\)$", "", name).lower()


def _below(node: dict[str, Any], root: str, inside: bool = False) -> set[str]:
    inside = inside or node["LabelName"] == root
    found = {node["LabelName"]} if inside else set()
    for child in [*node.get("Subcategory", ()), *node.get("Part", ())]:
        found |= _below(child, root, inside)
    return found
