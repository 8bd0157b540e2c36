"""Annotation files with bad rows, stray quotes, other columns, or something else in them."""

import csv
import threading
from collections import Counter

import numpy as np
import pytest
from miniature_bucket import PATHS

from datamodules.openimages.build import build
from datamodules.openimages.tables import read_csv

CLASS_NAMES = "v7/oidv7-class-descriptions-boxable.csv"


def test_bad_rows_and_bad_paths_are_counted(miniature, built, tmp_path):
    rows = miniature.rows["masks"]
    rows.append(dict(rows[0]))
    rows[1]["MaskPath"] = "../../" + rows[1]["MaskPath"]
    rows[2]["BoxXMin"] = "left"
    rows[3]["ImageID"] = "no-such-id"
    assert built() == {"masks": 13, "bad_row": 2, "malformed_mask_path": 1, "duplicate_row": 1, "triplets": 9}


def test_a_row_with_too_few_cells_is_a_bad_row(miniature, config_of, tmp_path, counted):
    root = miniature.write(tmp_path / "bucket")
    with (root / "annotations" / PATHS["masks"]).open("a") as file:
        file.write("677c122b0eaa5d16_m04yx4_9a041d52.png,677c122b0eaa5d16\n")
    assert counted(build(config_of(root))) == {"masks": 13, "bad_row": 1, "triplets": 12}


def test_a_stray_quote_spoils_its_own_row_alone(miniature, config_of, tmp_path, counted):
    root = miniature.write(tmp_path / "bucket")
    for kind in ("masks", "boxes", "labels"):
        path = root / "annotations" / PATHS[kind]
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:4], '"5,x', *lines[4:], ""]))
    part = build(config_of(root))
    assert counted(part) == {"masks": 13, "bad_row": 1, "triplets": 12}
    assert [part["tables"][kind] for kind in ("masks", "boxes", "image_labels")] == [{"rows": 13, "bad_rows": 1}] * 3


def test_rows_are_counted_by_one_thread(tmp_path):
    """Arrow tells of rows with too many or too few cells from threads of its own."""
    threads = set()

    class Watched(Counter):
        def __setitem__(self, name, count):
            threads.add(threading.get_ident())
            super().__setitem__(name, count)

    good, bad = "0123456789abcdef,/m/01yrx,1\n" * 50_000, "0123456789abcdef,/m/04yx4\n" * 50_000
    (tmp_path / "labels.csv").write_text("ImageID,LabelName,Confidence\n" + (good + bad) * 2)
    counts = Watched()
    parts = list(read_csv(tmp_path / "labels.csv", "image_labels", counts))
    assert counts == {"rows": 200_000, "bad_rows": 100_000} and threads == {threading.get_ident()}
    assert [sum(len(part[i]) for part in parts) for i in (0, 1)] == [100_000, 100_000], "good ones, and what the bad ones name"


@pytest.mark.parametrize(("name", "content", "said"), [
    (PATHS["masks"], b"<html>" + bytes(200_000), r"object-segmentation.csv lacks the columns .*remove it, or name the right one"),
    (PATHS["metadata"], np.random.default_rng(0).bytes(300_000), r"boxable-with-rotation.csv lacks the columns"),
    (CLASS_NAMES, "LabelName,DisplayName\n/m/01yrx,Ch\xe2t\n".encode("latin-1"), r"class-descriptions-boxable.csv is no file of class names.*remove it"),
    (CLASS_NAMES, b"/m/01yrx," + b"x" * 200_000, r"class-descriptions-boxable.csv is no file of class names"),
])
def test_a_file_that_is_something_else_is_named(miniature, config_of, tmp_path, name, content, said):
    root = miniature.write(tmp_path / "bucket")
    (root / "annotations" / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        build(config_of(root))


def test_missing_columns_are_an_error_and_extra_ones_are_not(miniature, config_of, tmp_path, counted):
    root = miniature.write(tmp_path / "bucket")
    path = root / "annotations" / PATHS["boxes"]
    rows = list(csv.DictReader(path.open()))
    for change, columns in (({"Extra": "x;y"}, [*rows[0], "Extra"]), ({}, [c for c in rows[0] if c != "IsGroupOf"])):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows([row | change for row in rows])
        if change:
            assert counted(build(config_of(root, "with-extra"))) == {"masks": 12, "triplets": 12}
    with pytest.raises(ValueError, match=r"annotations-bbox.csv lacks the columns \['IsGroupOf'\]"):
        build(config_of(root, "without"))
