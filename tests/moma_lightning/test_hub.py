"""Names of models: what is a path, what is a hub name, and what is said when neither is there."""

import pytest
from diffusers import DEISMultistepScheduler
from huggingface_hub import constants

from experiments.mini.models import mini_foundation
from moma_lightning.foundation import ddim, load_base, load_image_encoder
from moma_lightning.hub import REPOSITORY, HubName, find_file, hub_name, local_path, resolve

COMMIT = "018e402774aeeddd60609b4ecdb7e298259dc729"


@pytest.mark.parametrize(("name", "parsed"), [
    ("owner/name", HubName("owner/name")),
    (f"owner/name.v1_x@{COMMIT}", HubName("owner/name.v1_x", COMMIT)),
    (f"h94/IP-Adapter@{COMMIT}/models/image_encoder", HubName("h94/IP-Adapter", COMMIT, "models/image_encoder")),
    ("h94/IP-Adapter@main/models/ip-adapter_sd15.safetensors", HubName("h94/IP-Adapter", "main", "models/ip-adapter_sd15.safetensors")),
])
def test_hub_names_are_taken_apart_and_put_together(name, parsed):
    assert hub_name(name) == parsed and str(parsed) == name


@pytest.mark.parametrize("name", ["no/such/folder", "./folder", "../a/b", "name", "owner/name@", "owner/name/file@main", "/absolute/path"])
def test_other_names_were_meant_as_paths(name):
    with pytest.raises(FileNotFoundError, match="no such file or folder here"):
        resolve(name)


def test_a_path_inside_becomes_a_subfolder():
    assert resolve(f"o/n@{COMMIT}/a/b") == {"pretrained_model_name_or_path": "o/n", "revision": COMMIT, "subfolder": "a/b"}
    assert resolve("o/n") == {"pretrained_model_name_or_path": "o/n"}


def test_a_folder_that_is_there_wins_over_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    assert resolve("owner/name") == {"pretrained_model_name_or_path": "owner/name"}


def test_a_path_is_looked_for_here_before_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_path("README.md") == REPOSITORY / "README.md"
    (tmp_path / "README.md").write_text("mine")
    assert local_path("README.md").read_text() == "mine"


def test_a_repository_is_no_file():
    with pytest.raises(FileNotFoundError, match="write owner/name@main/<file>"):
        find_file("owner/name")


@pytest.mark.parametrize("load, field", [(load_base, "base"), (load_image_encoder, "image_encoder")])
def test_what_is_missing_offline_is_named_with_the_command_that_fetches_it(load, field, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"owner/missing@v1 .*HF_HUB_OFFLINE is set\)\.\n.*moma_lightning fetch --models owner/missing@v1"):
        load(mini_foundation(**{field: "owner/missing@v1"}))


def test_another_samplers_config_does_not_bring_ddims_own_defaults():
    """DEIS and the like, which fine-tunes ship, say nothing of these; DDIMScheduler by itself would clip and shift."""
    scheduler = ddim(DEISMultistepScheduler.from_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}).config)
    assert (scheduler.config.clip_sample, scheduler.config.set_alpha_to_one, scheduler.config.steps_offset) == (False, False, 1)
    own = ddim({"beta_start": 0.001, "prediction_type": "v_prediction", "steps_offset": 0})
    assert (own.config.beta_start, own.config.prediction_type, own.config.steps_offset) == (0.001, "v_prediction", 0)
