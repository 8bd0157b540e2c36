"""OpenImages V7 in miniature: the real layout, file names, columns and structure, drawn by the mini world; and a server for it.

    <root>/annotations/v5|v6|v7|2018_04/...     as under storage.googleapis.com/openimages
    <root>/pictures/<split>/<ImageID>.jpg       as in the bucket open-images-dataset
    <root>/captions.csv                         ImageID,caption

`python tests/miniature_bucket.py FOLDER [COUNT]` writes one to look at, with the hierarchy's human part as it really is.
"""

import base64
import csv
import hashlib
import io
import json
import sys
import threading
import zipfile
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from datamodules.dreambooth import DreamBooth
from datamodules.mini import world
from datamodules.mini.render import render

CLASSES = {"mug": "/m/02jvh9", "car": "/m/0k4j", "bottle": "/m/04dr76w", "hat": "/m/02dl1y", "ball": "/m/018xm", "toy robot": "/m/0138tl",
           "cat": "/m/01yrx", "duck": "/m/09ddx", "fish": "/m/0ch_cf", "rabbit": "/m/06mf6"}
NAMES = {**{i: label.capitalize() for label, i in CLASSES.items()}, "/m/01g317": "Person", "/m/04yx4": "Man", "/m/0k65p": "Human hand"}
#: Of the real hierarchy: Person with some of its subcategories and parts, and the miniature's own classes beside it.
HIERARCHY = {"LabelName": "/m/0bl9f", "Subcategory": [
    {"LabelName": "/m/01g317", "Subcategory": [{"LabelName": "/m/04yx4"}, {"LabelName": "/m/03bt1vf"}],
     "Part": [{"LabelName": "/m/02p0tk3", "Part": [{"LabelName": "/m/0k65p"}, {"LabelName": "/m/0dzct"}]}]},
    {"LabelName": "/m/02p0tk3", "Part": [{"LabelName": "/m/0k65p"}, {"LabelName": "/m/0dzct"}]},
    *({"LabelName": i} for i in CLASSES.values())]}

MASKS = ["MaskPath", "ImageID", "LabelName", "BoxID", "BoxXMin", "BoxXMax", "BoxYMin", "BoxYMax", "PredictedIoU", "Clicks"]
BOXES = ["ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax", "IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside"]
LABELS = ["ImageID", "Source", "LabelName", "Confidence"]
METADATA = """ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,OriginalSize,OriginalMD5,Thumbnail300KURL,
Rotation""".replace("\n", "").split(",")


def paths(split: str) -> dict[str, str]:
    """A split's annotation files: training's boxes and metadata have other names."""
    train = split == "train"
    return {"masks": f"v5/{split}-annotations-object-segmentation.csv",
            "boxes": "v6/oidv6-train-annotations-bbox.csv" if train else f"v5/{split}-annotations-bbox.csv",
            "labels": f"v5/{split}-annotations-human-imagelabels-boxable.csv",
            "metadata": f"2018_04/{split}/{split}-images-{'boxable-' if train else ''}with-rotation.csv"}


PATHS = paths("train")


@dataclass
class Miniature:
    """The rows and files that `write` will write: tests change them before."""

    size: int = 96
    split: str = "train"
    names: dict[str, str] = field(default_factory=lambda: dict(NAMES))
    rows: dict[str, list[dict]] = field(default_factory=lambda: defaultdict(list))
    masks: dict[str, bytes] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    captions: dict[str, str | bytes] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)

    @classmethod
    def drawn(cls, count: int, size: int = 96, first: int = 0, split: str = "train") -> "Miniature":
        """`count` pictures, one good mask each, with masks at three quarters of the pictures' size."""
        made = cls(size, split)
        for start in range(0, count, 256):
            rng = [np.random.default_rng([77, first + i]) for i in range(start, min(count, start + 256))]
            described = [world.sample_picture(r, world.sample_identity(r)) for r in rng]
            images, masks = render(described, size)
            for number, (picture, image, mask) in enumerate(zip(described, images, masks, strict=True), first + start):
                made.add(number, picture, Image.fromarray(image), Image.fromarray(mask))
        return made

    @classmethod
    def photographed(cls, root: Path) -> "Miniature":
        """Each photograph of a folder of google/dreambooth's layout, with an ellipse for its mask, under class ids of its own."""
        made = cls()
        photographs = [(subject.label, path) for subject in DreamBooth(root).subjects for path in subject.images]
        for number, (label, path) in enumerate(photographs):
            class_id = CLASSES.get(label, f"/m/{hashlib.md5(label.encode()).hexdigest()[:6]}")
            made.names[class_id] = label.capitalize()
            with Image.open(path) as photograph:
                mask = Image.new("L", photograph.size)
            sides = tuple(share * side for share in (0.2, 0.8) for side in mask.size)
            ImageDraw.Draw(mask).ellipse(sides, fill=255)
            made.add_picture(number, path.read_bytes(), class_id, f"a photo of a {label}", mask)
        return made

    def add(self, number: int, picture: world.Picture, image: Image.Image, mask: Image.Image) -> str:
        return self.add_picture(number, encode(image, "JPEG", quality=92), CLASSES[picture.identity.label], world.caption(picture), mask)

    def add_picture(self, number: int, content: bytes, class_id: str, caption: str | bytes, mask: Image.Image) -> str:
        """A picture's file, its caption, metadata and label, and its mask, stored at three quarters of its size; returns the ImageID."""
        image_id = hashlib.md5(f"picture {number}".encode()).hexdigest()[:16]
        self.ids.append(image_id)
        self.pictures[image_id], self.captions[image_id] = content, caption
        left, top, right, bottom = (v / side for v, side in zip(mask.getbbox() or (), mask.size * 2, strict=True))
        self.add_mask(image_id, class_id, mask.resize([side * 3 // 4 for side in mask.size], 0), (left, right, top, bottom))
        digest = base64.b64encode(hashlib.md5(self.pictures[image_id]).digest()).decode()
        self.rows["metadata"].append(dict(
            ImageID=image_id, Subset=self.split, OriginalURL=f"https://example.org/{image_id}_o.jpg", OriginalLandingURL=f"https://example.org/{image_id}",
            License="https://creativecommons.org/licenses/by/2.0/", AuthorProfileURL="", Author=f"Author {number % 7}", Title='a "title",\nin two lines',
            OriginalSize=len(self.pictures[image_id]), OriginalMD5=digest, Thumbnail300KURL="", Rotation="0.0" if number % 2 else ""))
        self.rows["labels"].append(dict(ImageID=image_id, Source="verification", LabelName=class_id, Confidence=1))
        return image_id

    def add_mask(self, image_id: str, class_id: str, mask: Image.Image, box: tuple, iou: float | str = 0.9, **flags) -> str:
        """A mask with its box; returns the MaskPath."""
        box_id = hashlib.md5(f"{image_id} {class_id} {box}".encode()).hexdigest()[:8]
        name = f"{image_id}_{class_id[1:].replace('/', '')}_{box_id}.png"
        sides = dict(zip(("XMin", "XMax", "YMin", "YMax"), (f"{v:.6f}" for v in box), strict=True))
        self.masks[name] = encode(mask.convert("1"))
        self.rows["masks"].append(dict(MaskPath=name, ImageID=image_id, LabelName=class_id, BoxID=box_id, PredictedIoU=iou, Clicks="0.1 0.2 0;0.3 0.4 1",
                                       **{f"Box{side}": value for side, value in sides.items()}))
        self.rows["boxes"].append(dict(ImageID=image_id, Source="xclick", LabelName=class_id, Confidence=1, IsOccluded=0, IsTruncated=0, IsGroupOf=0,
                                       IsDepiction=0, IsInside=0) | sides | flags)
        return name

    def row(self, kind: str, image_id: str) -> dict:
        return next(row for row in self.rows[kind] if row["ImageID"] == image_id)

    def write(self, root: Path) -> Path:
        annotations = root / "annotations"
        for kind, columns in {"masks": MASKS, "boxes": BOXES, "labels": LABELS, "metadata": METADATA}.items():
            write_csv(annotations / paths(self.split)[kind], columns, self.rows[kind])
        write_csv(annotations / "v7/oidv7-class-descriptions-boxable.csv", ["LabelName", "DisplayName"],
                  [dict(LabelName=i, DisplayName=name) for i, name in self.names.items()])
        (annotations / "2018_04/bbox_labels_600_hierarchy.json").write_text(json.dumps(HIERARCHY))
        for digit in "0123456789abcdef":
            path = annotations / f"v5/{self.split}-masks/{self.split}-masks-{digit}.zip"
            path.parent.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for name in sorted(name for name in self.masks if name[0] == digit):
                    archive.writestr(name, self.masks[name])
        (root / "pictures" / self.split).mkdir(parents=True)
        for image_id, content in self.pictures.items():
            (root / f"pictures/{self.split}/{image_id}.jpg").write_bytes(content)
        with (root / "captions.csv").open("wb") as file:
            file.write(b"ImageID,caption\n")
            for image_id, caption in self.captions.items():
                file.write(image_id.encode() + b',"' + (caption if isinstance(caption, bytes) else caption.encode()) + b'"\n')
        return root


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_csv(path: Path, columns: list[str], rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


class Bucket(ThreadingHTTPServer):
    """Serves a folder as a storage bucket does: ranges, ETag with the MD5, 403 for what is not there, /moved/ redirects.

    faults: path (below the root) -> what its next requests meet, one after the other: an HTTP status, "cut" (the connection is
    cut in the middle), "garbled" (a byte is wrong). retry_after: of the status 429, seconds. requests: every path and Range asked for.
    """

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.faults: dict[str, list[int | str | None]] = defaultdict(list)
        self.retry_after = 0
        self.requests: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Bucket
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: with it each answer waits 40 ms

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path.startswith("/moved/"):
            self.answer(302, {"Location": self.path.removeprefix("/moved")})
            return
        name = self.path.lstrip("/")
        self.server.requests.append((name, self.headers.get("Range")))
        fault = self.server.faults[name].pop(0) if self.server.faults[name] else None
        path = self.server.root / name
        if isinstance(fault, int):
            self.answer(fault, {"Retry-After": str(self.server.retry_after)} if fault == 429 else {})
        elif not path.is_file():
            self.answer(404 if name.startswith("annotations") else 403)
        else:
            self.send(path.read_bytes(), fault)

    def send(self, content: bytes, fault: str | None):
        status, headers = 200, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}
        total = len(content)
        if self.headers.get("Range"):
            start, _, stop = self.headers["Range"].removeprefix("bytes=").partition("-")
            if int(start) >= total:
                self.answer(416, {"Content-Range": f"bytes */{total}"})
                return
            content = content[int(start) : int(stop) + 1 if stop else None]
            status, headers = 206, headers | {"Content-Range": f"bytes {start}-{int(start) + len(content) - 1}/{total}"}
        if fault == "garbled":
            content = bytes([content[0] ^ 1]) + content[1:]
        self.answer(status, headers, content, cut=fault == "cut")

    def answer(self, status: int, headers: dict | None = None, content: bytes = b"", cut: bool = False):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.wfile.flush()
            self.close_connection = True


@contextmanager
def served(root: Path):
    bucket = Bucket(root)
    thread = threading.Thread(target=bucket.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield bucket
    finally:
        bucket.shutdown()
        bucket.server_close()
        thread.join()


if __name__ == "__main__":
    Miniature.drawn(int(sys.argv[2]) if len(sys.argv) > 2 else 200, 128).write(Path(sys.argv[1]))
