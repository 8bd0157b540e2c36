"""Figures 8, 9 and 10, drawn by the real pipeline on tiny random weights."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.figures import sampled
from evaluation.figures.sampled import base_name, beta_strip, community_grid, masking_grid, settings_grid
from evaluation.methods import Models, Moma
from evaluation.plan import Evaluation
from evaluation.stamps import read_stamp
from evaluation.studio import Studio, as_picture, mask_path
from moma_lightning.foundation import FoundationConfig
from moma_lightning.pipeline import MoMAPipeline
from tests.evaluation.fakes import fake_config
from tests.tiny import EMBED_DIM, tiny_adapter, tiny_base


class Embedder(torch.nn.Module):
    """In CLIP's place: an embedding of the picture's mean colour."""

    def forward(self, pixels):
        return pixels.mean((2, 3)).repeat(1, EMBED_DIM // 3)


@pytest.fixture(scope="module")
def pipeline() -> MoMAPipeline:
    base = tiny_base()
    made = MoMAPipeline.from_base(base, tiny_adapter(base))
    made.clip = Embedder()
    return made


@pytest.fixture
def studio(tmp_path, monkeypatch, pipeline) -> Studio:
    """Two steps a picture; `studio.loaded` lists the base of each pipeline that was asked for."""
    for name in ("base", "other", "adapter", "decoder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    folders = {name: str(tmp_path / "base") for name in ("base", "image_encoder", "mllm", "ip_adapter", "sam")}
    config = fake_config(tmp_path, {}, {"sampler": {"num_inference_steps": 2, "guidance_scale": 2.0}}, foundation=FoundationConfig(**folders),
                         adapter=str(tmp_path / "adapter"), decoder=str(tmp_path / "decoder"))
    studio = Studio(Evaluation.open(config), tmp_path / "figures")
    studio.loaded = []
    monkeypatch.setattr(Models, "pipeline", lambda self, *_: studio.loaded.append(self.foundation.base) or pipeline)
    return studio


def settings(path) -> dict:
    return read_stamp(Path(path))["settings"]


def test_the_beta_strip_is_one_noise_at_seven_strengths(studio):
    grid = beta_strip(studio, subjects=2)
    assert [len(row.cells) for row in grid.rows] == [8, 8]
    for row in grid.rows:
        made = [settings(cell.path) for cell in row.cells[1:]]
        assert [one["method"]["beta"] for one in made] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
        assert len({one["task"]["seed"] for one in made}) == 1
        assert [cell.caption for cell in row.cells[1:]] == ["beta 0", "beta 0.2", "beta 0.4", "beta 0.6", "beta 0.8", "beta 1", "beta 1.2"]
        pictures = [np.asarray(Image.open(cell.path)) for cell in row.cells[1:]]
        assert all((first != second).any() for first, second in pairwise(pictures))


def test_a_second_call_makes_nothing_and_a_broken_picture_is_made_again(studio):
    first = beta_strip(studio, subjects=1)
    calls = len(studio.loaded)
    assert beta_strip(studio, subjects=1) == first
    assert len(studio.loaded) == calls == 7
    broken = Path(first.rows[0].cells[3].path)
    content = broken.read_bytes()
    broken.write_bytes(content[:50])
    beta_strip(studio, subjects=1)
    assert len(studio.loaded) == calls + 1
    assert broken.read_bytes() == content


def test_the_first_noise_is_the_evaluations_own(studio):
    subject = studio.evaluation.subjects[0]
    method = Moma(beta=1.0)
    own = studio.evaluation.planned("moma", method, [subject])[0]
    assert studio.plan("beta1", method, subject).settings == own.settings


def test_masking_is_six_noises_at_three_strengths_with_masks(studio):
    grid = masking_grid(studio)
    assert [row.title for row in grid.rows] == ["mask strength 1", "mask strength 0.5", "without masking"]
    seeds = [[settings(cell.path)["task"]["seed"] for cell in row.cells[::2]] for row in grid.rows]
    assert seeds[0] == seeds[1] == seeds[2]
    assert len(set(seeds[0])) == 6
    assert [settings(row.cells[0].path)["method"]["mask_strength"] for row in grid.rows] == [1.0, 0.5, 0.0]
    masks = [Image.open(cell.path) for row in grid.rows for cell in row.cells[1::2]]
    assert {mask.mode for mask in masks} == {"L"}
    assert all(np.asarray(mask).max() > 0 for mask in masks)


def test_a_masks_picture_is_the_last_steps_m_gen(studio, pipeline):
    """Against the pipeline called directly."""
    grid = masking_grid(studio)
    cell = grid.rows[1].cells[2]
    made, subject = settings(cell.path), next(s for s in studio.evaluation.subjects if s.label == "cat")
    reference = studio.evaluation.reference(subject, 0)
    noise = [torch.Generator().manual_seed(made["task"]["seed"])]
    output = pipeline([made["task"]["prompt"]], image=reference.image, mask=reference.mask, label="cat", beta=1.0, mask_strength=0.5,
                      guidance_scale=2.0, num_inference_steps=2, generator=noise, return_masks=True)
    expected = (output.masks[-1, 0, 0].numpy() * 255).round()
    assert np.abs(np.asarray(Image.open(mask_path(Path(cell.path))), float) - expected).max() <= 1


def test_other_bases_take_the_adapters_as_they_are(studio, tmp_path):
    grid = community_grid(studio, [str(tmp_path / "other")], subjects=2)
    assert grid.columns == ["Reference", "Training base", "other"]
    assert [len(row.cells) for row in grid.rows] == [3, 3]
    own, other = (settings(cell.path)["weights"] for cell in grid.rows[0].cells[1:])
    assert own["base"] != other["base"]
    assert own | {"base": None} == other | {"base": None}
    assert set(studio.loaded) == {str(tmp_path / "base"), str(tmp_path / "other")}
    assert settings(grid.rows[0].cells[1].path)["task"]["seed"] == settings(grid.rows[0].cells[2].path)["task"]["seed"]


def test_poses_and_camera_are_drawn_on_the_base_that_knows_them_and_accessories_on_the_own(studio, tmp_path):
    grid = settings_grid(studio, str(tmp_path / "other"), per_kind=1, prompts=2)
    assert [row.title for row in grid.rows] == ["Accessory", "Pose", "Camera"]
    for row in grid.rows:
        assert [len(row.cells), row.cells[0].title] == [3, "Reference"]
        tasks = [settings(cell.path)["task"] for cell in row.cells[1:]]
        assert {task["kind"] for task in tasks} == {row.title.lower()} and [task["prompt"] for task in tasks] == [cell.caption for cell in row.cells[1:]]
    accessory, pose, camera = (settings(row.cells[1].path)["weights"]["base"] for row in grid.rows)
    assert accessory != pose == camera and set(studio.loaded) == {str(tmp_path / "base"), str(tmp_path / "other")}
    calls = len(studio.loaded)
    assert settings_grid(studio, str(tmp_path / "other"), per_kind=1, prompts=2) == grid and len(studio.loaded) == calls
    studio.evaluation.subjects = studio.evaluation.subjects[:1]
    assert [row.title for row in settings_grid(studio, per_kind=1, prompts=1).rows] == ["Accessory", "Pose", "Camera"], "of one subject"


def test_a_base_is_called_by_its_folders_or_files_name():
    bases = {None: "Training base", "bases/oil_paint": "oil paint", "loras/pastel.v2.safetensors": "pastel.v2", "o/some@main": "some",
             "o/loras@main/oil.safetensors": "oil"}
    assert [*map(base_name, bases)] == [*bases.values()]


def test_masks_become_grey_levels():
    assert np.asarray(as_picture(torch.tensor([[0.0, 0.5], [1.0, 2.0]]))).tolist() == [[0, 128], [255, 255]]


def test_subjects_are_of_different_kinds(studio):
    evaluation = studio.evaluation
    doubled = [replace(subject, name=f"{subject.name}{i}") for subject in evaluation.subjects for i in range(2)]
    evaluation.subjects = doubled
    assert [subject.name for subject in sampled.some_subjects(evaluation, 2)] == ["red_mug0", "tabby0"]
    assert len(sampled.some_subjects(evaluation, 5)) == 5
