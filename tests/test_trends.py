"""The paper's trends on the mini world with the shipped MoMA: a reduced evaluation that fails when one of them goes away.

tests/golden/trends.json keeps what was measured; each trend must stay above half of it, and M_gen's IoU with the subject above .6 and above that
without masks. After a change that is meant to move them `python -m tests.test_trends` writes it anew; say why in the commit. Each is then broken at
the part that makes it.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch

from datamodules.mini.export import export_dreambooth
from evaluation import mask_iou
from evaluation.config import EvalConfig, WandbConfig
from evaluation.generation import generate
from evaluation.mask_iou import run_mask_iou
from evaluation.methods import IpAdapter, Method, Moma, TextOnly
from evaluation.plan import Evaluation
from evaluation.scoring import score
from evaluation.statistics import summarise
from experiments.mini.models import MINI, PROTOCOL, mini_foundation
from moma_lightning import pipeline
from moma_lightning.models import attention
from moma_lightning.models.masks import MaskPyramid
from moma_lightning.pipeline import MoMAPipeline
from moma_lightning.subject import label_tokens

GOLDEN = Path(__file__).parent / "golden" / "trends.json"
TRAINED = f"{MINI}/moma"
METHODS: dict[str, Method] = {
    "text_only": TextOnly(),
    "ip_adapter": IpAdapter(),
    "beta_0": Moma(beta=0.0),
    "beta_1": Moma(beta=1.0),
    "mask_0": Moma(beta=1.0, mask_strength=0.0),
    "clip_0": Moma(beta=0.0, context="image"),
    "textures": Moma(beta=1.0, texture_beta=0.4),
}
#: Part -> the trends that it makes, by name: metric and the two methods whose means are subtracted (paper: Table 4, Table 1, Table 3, section 4.1).
PARTS: dict[str, dict[str, tuple[str, str, str]]] = {
    "subject": {"subject": ("dino", "beta_1", "beta_0"), "subject_clip_i": ("clip_i", "beta_1", "beta_0")},
    "baseline": {"baseline": ("dino", "beta_1", "ip_adapter")},
    "context": {"context": ("dino", "beta_0", "text_only"), "ip_adapter": ("dino", "ip_adapter", "text_only"),
                "ip_adapter_clip_i": ("clip_i", "ip_adapter", "text_only")},
    "masking": {"masking": ("clip_t_context", "beta_1", "mask_0")},
    "mllm": {"mllm": ("clip_t_texture", "beta_0", "clip_0"), "textures": ("clip_t_texture", "textures", "ip_adapter")},
}


def reduced(run: Path, data: Path, methods: dict[str, Method], contexts: int, textures: int) -> EvalConfig:
    """The mini evaluation on 6 of its subjects."""
    small = {"subjects": ["cat", "duck", "car", "ball", "mug", "toy_robot"], "context_prompts": contexts, "texture_prompts": textures, "extra_scores": []}
    return EvalConfig(str(run), str(data), PROTOCOL, mini_foundation(), small, methods, f"{TRAINED}/adapter", f"{TRAINED}/image_feature_decoder",
                      wandb=WandbConfig(enabled=False))


def trends(part: str, run: Path, data: Path) -> dict[str, float]:
    """How much the first method of each of a part's trends scores above the second."""
    methods = {method: METHODS[method] for _, *pair in PARTS[part].values() for method in pair}
    config = reduced(run, data, methods, *((0, 3) if part == "mllm" else (3, 0)))
    generate(config)
    summary = summarise(score(Evaluation.open(config), methods))
    return {name: summary[a][metric]["mean"] - summary[b][metric]["mean"] for name, (metric, a, b) in PARTS[part].items()}


def those_there(found: dict[str, float]) -> list[str]:
    golden = json.loads(GOLDEN.read_text())
    return [name for name, difference in found.items() if difference > golden[name] / 2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "dreambooth"
    export_dreambooth(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def broken(monkeypatch):
    """A function that silences one part, as a bug would."""
    subject = (attention, "add_subject_attention", lambda output, *given: output)
    parts = {
        "subject": subject,
        "baseline": subject,
        "context": (attention, "add_context_attention", lambda output, *given: output),
        "masking": (MaskPyramid, "weight", lambda self, sequence_length, dtype=torch.float32: torch.ones(len(self.mask), sequence_length, dtype=dtype)),
        "mllm": (MoMAPipeline, "context_embeds", lambda self, subject, prompts: self.clip(subject.pixels)),
    }
    return lambda name: monkeypatch.setattr(*parts[name])


@pytest.mark.parametrize("part", PARTS)
def test_the_trends_are_there(part, run, data):
    assert those_there(trends(part, run, data)) == list(PARTS[part])


@pytest.mark.parametrize("part", PARTS)
def test_the_trends_fall_when_their_part_is_broken(part, broken, tmp_path, data):
    broken(part)
    assert those_there(trends(part, tmp_path, data)) == []


def places(run: Path, data: Path) -> list[float]:
    """Mean IoU of M_gen(0) with the subject that SAM finds in the picture, at each mask strength."""
    found = run_mask_iou(reduced(run, data, {}, 3, 0))
    return [found[f"mask {strength:g}"]["mean"] for strength in mask_iou.STRENGTHS]


def test_m_gen_lies_on_the_subject_and_less_so_without_masks(tmp_path, data):
    masked, _, unmasked = places(tmp_path, data)
    assert masked > 0.6 and masked > unmasked + 0.02


def test_masking_is_what_keeps_it_there(tmp_path, data, broken, monkeypatch):
    broken("masking")
    monkeypatch.setattr(mask_iou, "STRENGTHS", (1.0, 0.0))
    masked, unmasked = places(tmp_path, data)
    assert masked < unmasked + 0.02


def test_m_gen_does_not_lie_there_when_it_is_read_off_another_token(tmp_path, data, monkeypatch):
    monkeypatch.setattr(pipeline, "label_tokens", lambda *given: label_tokens(*given).roll(-2, dims=1))  # the start of the text; other words know of the label
    monkeypatch.setattr(mask_iou, "STRENGTHS", (1.0,))
    assert places(tmp_path, data)[0] < 0.6


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        export_dreambooth(Path(folder) / "dreambooth")
        found = [trends(part, Path(folder) / "run", Path(folder) / "dreambooth") for part in PARTS]
    measured = {name: round(difference, 4) for part in found for name, difference in part.items()}
    GOLDEN.write_text(json.dumps(measured, indent=1) + "\n")
    print(measured)
