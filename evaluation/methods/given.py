"""Pictures that are not sampled here: the real ones, and those another program made."""

import csv
import hashlib
import io
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import get_args

from PIL import Image

from datamodules.dreambooth import Subject
from evaluation.methods.base import Method, Models, Reference
from evaluation.protocols import Sampler
from evaluation.stamps import load_picture
from evaluation.tasks import PictureTask, PromptKind

COLUMNS = {"subject", "prompt", "path"}


@dataclass
class RealImages(Method):
    """The oracle: each real picture scored against the other real pictures of its subject."""

    is_oracle = True

    def generate(self, subject: Subject, reference: Reference, tasks: list[PictureTask]) -> list[Image.Image]:
        raise NotImplementedError("the real pictures are scored as they are")


@dataclass
class Folder(Method):
    """Pictures named by a CSV with the columns subject, prompt and path; where a subject has several references also reference (a file name, or * for
    pictures made without any: by text alone, by a tuned model), and kind (context, texture, ...) where a prompt that is of two kinds has other
    pictures for each.

    Paths are relative to the CSV. Several rows of one prompt are its pictures, in order.
    """

    table: str

    def rows(self) -> list[dict[str, str]]:
        """Raises ValueError, with the table's name, for one that is not UTF-8, lacks a column, or has a row that lacks one of these cells or has too many."""
        try:
            text = Path(self.table).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.table} is not UTF-8: {error}") from error
        reader = csv.DictReader(io.StringIO(text, newline=""))
        if missing := COLUMNS - set(reader.fieldnames or ()):
            raise ValueError(f"{self.table} lacks the columns {', '.join(sorted(missing))}")
        rows = []
        for row in reader:
            if empty := sorted(column for column in COLUMNS if not row[column]):
                raise ValueError(f"{self.table}, line {reader.line_num}: {', '.join(empty)} is empty")
            if None in row:  # where csv puts them
                raise ValueError(f"{self.table}, line {reader.line_num}: more cells than columns; a prompt with a comma wants quotes")
            rows.append(row)
        return rows

    def require_references(self, counts: Mapping[str, int]) -> None:
        """A picture made from one reference and scored under another would be compared to its own input where that is to be left out."""
        for row in self.rows():
            if counts.get(row["subject"], 1) > 1 and not row.get("reference"):
                raise ValueError(f"{self.table}: {row['subject']!r} is drawn from {counts[row['subject']]} references, and the row of {row['prompt']!r} does "
                                 "not say from which: add the column reference (the file's name, or \"*\" for pictures made without any: text only, tuned "
                                 "models)")

    def weights(self, models: Models) -> dict[str, str | None]:
        name = f"{self.table} and its pictures"
        if name not in models.digests:
            digest = hashlib.sha256(Path(self.table).read_bytes())
            for row in self.rows():
                digest.update(self._path(row).read_bytes() if self._path(row).exists() else b"missing")
            models.digests[name] = digest.hexdigest()[:16]
        return {"pictures": models.digests[name]}

    def setup(self, models: Models, sampler: Sampler) -> None:
        self.pictures: dict[tuple[str, str, str, str], list[Path]] = defaultdict(list)
        for row in self.rows():
            if row.get("kind") and row["kind"] not in get_args(PromptKind):
                raise ValueError(f"{self.table}: the kind {row['kind']!r} is none of {', '.join(get_args(PromptKind))}; leave it empty for all")
            self.pictures[row["subject"], row.get("reference") or "*", row.get("kind") or "", row["prompt"]].append(self._path(row))

    def generate(self, subject: Subject, reference: Reference, tasks: list[PictureTask]) -> list[Image.Image]:
        return [load_picture(self._find(task, reference.path.name)) for task in tasks]

    def _find(self, task: PictureTask, reference: str) -> Path:
        for name, kind in product((reference, "*"), (task.kind, "")):
            paths = self.pictures.get((task.subject, name, kind, task.prompt), [])
            if task.picture < len(paths):
                return paths[task.picture]
        wanted = f"subject {task.subject!r}, reference {reference!r}, {task.kind} prompt {task.prompt!r}"
        raise ValueError(f"{self.table} names no picture number {task.picture + 1} of {wanted}")

    def _path(self, row: dict[str, str]) -> Path:
        return Path(self.table).parent / row["path"]
