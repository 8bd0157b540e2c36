import json

import numpy as np
import pytest
from PIL import Image

from datamodules.mini.export import export_dreambooth
from evaluation.cli import main
from evaluation.mask_iou import mask_iou, summarise_ious

TRAINED = "experiments/mini/foundation/moma"


def grey(values) -> Image.Image:
    return Image.fromarray(np.asarray(values, np.uint8))


def test_iou_is_intersection_over_union_at_the_masks_resolution():
    subject = np.zeros((8, 8), bool)
    subject[:4] = True
    assert mask_iou(grey([[255, 255], [0, 0]]), subject) == 1
    assert mask_iou(grey([[255, 0], [0, 0]]), subject) == 0.5
    assert mask_iou(grey([[255, 127], [255, 0]]), subject) == pytest.approx(1 / 3)
    assert mask_iou(grey([[0, 0], [255, 255]]), subject) == 0
    assert mask_iou(grey([[0, 0], [0, 0]]), subject) == 0
    assert np.isnan(mask_iou(grey([[0, 0], [0, 0]]), np.zeros((8, 8), bool)))


def test_means_are_over_subjects_and_differences_are_paired():
    summary = summarise_ious({"mask 1": [[0.8, 0.6], [0.5]], "mask 0": [[0.6, 0.4], [0.3]]})
    assert summary["mask 1"]["mean"] == pytest.approx(0.6)
    (difference,) = summary["differences"]
    assert (difference["a"], difference["b"]) == ("mask 1", "mask 0")
    assert [difference[key] for key in ("mean", "lo", "hi")] == pytest.approx([0.2] * 3)
    missed = summarise_ious({"mask 1": [[float("nan"), 0.5], [0.0, 0.3]]})["mask 1"]
    assert missed["without_subject"] == 1, "a mask beside the subject is not a picture without one"
    assert missed["mean"] == pytest.approx(0.2)


def test_the_command_measures_the_shipped_model_and_makes_no_picture_twice(tmp_path):
    export_dreambooth(tmp_path / "dreambooth")
    small = {"subjects": ["mug", "cat"], "context_prompts": 3, "sampler": {"num_inference_steps": 4}}
    arguments = ["masks", "--config", "experiments/mini/eval.yaml", "--run", str(tmp_path / "run"), "--data", str(tmp_path / "dreambooth"),
                 "--adapter", f"{TRAINED}/adapter", "--decoder", f"{TRAINED}/image_feature_decoder", "--overrides", json.dumps(small)]
    main(arguments)
    summary = json.loads((tmp_path / "run/ablations/mask_iou.json").read_text())
    assert 0.3 < summary["mask 1"]["mean"] <= 1
    assert summary["made_with"]["judges"].keys() == {"segmenter"} and summary["sampler"]["num_inference_steps"] == 4
    assert {name: options["mask_strength"] for name, options in summary["methods"].items()} == {"mask 1": 1.0, "mask 0.5": 0.5, "mask 0": 0.0}
    assert f"digest `{summary['made_with']['protocol']}`: 2 subjects" in (tmp_path / "run/ablations/mask_iou.md").read_text()
    pictures = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/ablations/mask_iou").rglob("*.png")}
    assert len(pictures) == 3 * 2 * 3 * 2  # strengths, subjects, prompts, picture and mask
    main(arguments)
    assert pictures == {path: path.stat().st_mtime_ns for path in pictures}
