"""Fetching from a hub on the loopback interface, and reading offline what was fetched."""

import json
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import httpx

from evaluation.cli import main as evaluation
from evaluation.made_with import weights_of
from evaluation.methods import Models
from evaluation.metrics.configs import hub_name_of
from evaluation.protocols import named
from experiments.mini.models import MINI, mini_foundation
from moma_lightning.__main__ import main
from moma_lightning.checkpoints import read_adapter_file
from moma_lightning.digests import identity
from moma_lightning.fetch import fetch, fetch_model, git_digest, named_models, wanted
from moma_lightning.foundation import load_base, load_image_encoder, load_mllm
from moma_lightning.hub import find_file, loaded_commit
from tests.fake_hub import fake_hub

FOUNDATION = Path(__file__).parents[2] / MINI
EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def hub(tmp_path):
    with fake_hub(tmp_path / "cache") as hub:
        yield hub


def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_what_was_fetched_is_read_offline_as_if_it_lay_here(hub, tmp_path, monkeypatch):
    """In the repositories' own layouts: a pipeline, a model with its processor, and a folder and a file inside one repository."""
    hub.add_folder("o/base", FOUNDATION / "base")
    hub.repositories["o/base"] |= {"base.safetensors": b"a single-file copy", "safety_checker/model.safetensors": b"not read"}
    hub.add_folder("o/llava", FOUNDATION / "llava")
    hub.add_folder("o/ip", FOUNDATION / "image_encoder", "models/image_encoder/")
    hub.add_folder("o/ip", FOUNDATION / "ip_adapter", "models/")
    config = mini_foundation(base=f"o/base@{hub.commit('o/base')}", mllm="o/llava@main", image_encoder="o/ip@main/models/image_encoder",
                              ip_adapter="o/ip@main/models/ip-adapter.safetensors")
    fetch(models=[config.base, config.mllm, config.image_encoder, str(config.ip_adapter)], out=str(tmp_path / "fetched.json"))
    asked = len(hub.requests)
    offline(monkeypatch)
    for load in (load_base, load_image_encoder, lambda c: load_mllm(c)[0]):
        ours, shipped = load(config), load(mini_foundation())
        ours, shipped = (getattr(model, "unet", model).state_dict() for model in (ours, shipped))
        assert all(torch.equal(ours[name], shipped[name]) for name in shipped)
    assert "image_proj.proj.weight" in read_adapter_file(str(config.ip_adapter))[0]
    assert len(hub.requests) == asked
    manifest = json.loads((tmp_path / "fetched.json").read_text())
    known = json.loads((FOUNDATION / "manifest.json").read_text())["files"]
    digests = {entry["file"]: entry["sha256"] for entry in manifest if entry["name"] == "o/base"}
    assert digests == {name.removeprefix("base/"): about["sha256"] for name, about in known.items() if name.startswith("base/")}


def test_a_folder_without_a_processor_gets_clips_own_if_it_fits(hub):
    """As in IP-Adapter's repository, whose encoder reads 224 pixels. The mini encoder reads 64: that must not pass."""
    hub.add_folder("o/ip", FOUNDATION / "image_encoder", "models/image_encoder/")
    del hub.repositories["o/ip"]["models/image_encoder/preprocessor_config.json"]
    with pytest.raises(ValueError, match="CLIP's own is for 224 pixels, not the model's 64"):
        load_image_encoder(mini_foundation(image_encoder="o/ip@main/models/image_encoder"))


def test_names_in_yamls_and_in_the_yamls_they_name():
    names = named_models(EXPERIMENTS / "sd15_llava7b/stage1.yaml")
    assert len(names) == 7 and len({name.partition("@")[0] for name in names}) == 6  # IP-Adapter's repository twice
    assert named_models(EXPERIMENTS / "mini/stage1.yaml") == []


def test_every_model_of_an_experiment_is_pinned_to_a_commit():
    names = {name for path in EXPERIMENTS.glob("*/*.yaml") for name in named_models(path)}
    assert len(names) > 10
    assert [name for name in sorted(names) if not re.fullmatch(r"[0-9a-f]{40}", name.partition("@")[2].partition("/")[0])] == []


def test_encoders_of_a_protocol_are_named_for_fetching(capsys):
    evaluation(["models", "--config", str(EXPERIMENTS / "sd15_llava7b/eval.yaml")])
    clip = "openai/clip-vit-base-patch32@3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"
    assert json.loads(capsys.readouterr().out) == ["timm/vit_small_patch16_224.dino@main", clip]


def test_scores_tell_which_commit_of_a_branch_judged(hub):
    """DINO is not pinned: two states of its main branch must not look the same."""
    protocol = named("dreambooth")
    assert weights_of(protocol)["dino"] == "timm/vit_small_patch16_224.dino@main"
    told = []
    for weights in (b"one", b"two"):
        hub.repositories["timm/vit_small_patch16_224.dino"] = {"config.json": b"{}", "model.safetensors": weights}
        fetch_model("timm/vit_small_patch16_224.dino@main")
        told.append(weights_of(protocol))
        assert told[-1]["dino"] == f"timm/vit_small_patch16_224.dino@main ({hub.commit('timm/vit_small_patch16_224.dino')})"
    assert told[0]["dino"] != told[1]["dino"] and told[0]["clip"] == told[1]["clip"] == hub_name_of(protocol.clip)


def test_a_branch_is_known_by_the_commit_that_is_loaded(hub, monkeypatch):
    """The hub's, also where the cache holds an older one; where the hub does not answer the cache's."""
    for weights in (b"one", b"two"):
        hub.repositories["o/adapter"] = {"model.safetensors": weights}
        loaded_commit.cache_clear()  # of this process: a command asks once
        known = [identity(name) for name in ("o/adapter", "o/adapter@main", "o/adapter@main/model.safetensors")]
        loaded = find_file("o/adapter@main/model.safetensors")
        assert loaded.read_bytes() == weights
        assert known == [f"{name} ({loaded.parent.name})" for name in ("o/adapter", "o/adapter@main", "o/adapter@main/model.safetensors")]
    asked = len(hub.requests)
    assert Models(mini_foundation()).digest(f"o/adapter@{loaded.parent.name}") == f"o/adapter@{loaded.parent.name}" and len(hub.requests) == asked
    assert identity("o/adapter@gone") == "o/adapter@gone"
    hub.repositories["o/adapter"] = {"model.safetensors": b"three"}
    assert identity("o/adapter") == known[0], "asked once: what was drawn and scored in a process is of one commit"
    loaded_commit.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr("moma_lightning.hub.HfApi.model_info", Mock(side_effect=httpx.ConnectError("no route to it")))
        assert identity("o/adapter") == known[0]
    loaded_commit.cache_clear()
    offline(monkeypatch)
    assert find_file("o/adapter@main/model.safetensors") == loaded
    assert [identity("o/adapter"), identity("o/other@v1")] == [known[0], "o/other@v1"]


def test_of_each_folders_weights_one_format_is_fetched():
    transformers = ["config.json", "model.safetensors", "pytorch_model.bin", "flax_model.msgpack", "tokenizer.model", "README.md", "a.png",
                    "open_clip_model.safetensors"]
    assert wanted(transformers) == ["config.json", "model.safetensors", "tokenizer.model"]
    assert wanted(["config.json", "pytorch_model.bin"]) == ["config.json", "pytorch_model.bin"]
    pipeline = ["model_index.json", "v1-5.safetensors", "v1-5.ckpt", "unet/config.json", "unet/model.safetensors", "unet/model.fp16.safetensors",
                "vae/config.json", "vae/model.bin", "safety_checker/model.safetensors", "tokenizer/merges.txt"]
    assert wanted(pipeline) == ["model_index.json", "tokenizer/merges.txt", "unet/config.json", "unet/model.safetensors", "vae/config.json", "vae/model.bin"]
    assert wanted([*pipeline, "vae_decoder/config.json", "vae_decoder/model.onnx", "vae_encoder/config.json"]) == wanted(pipeline)  # as SDXL's repository
    ip_adapter = ["models/ip.bin", "models/ip.safetensors", "models/image_encoder/config.json", "models/image_encoder/model.safetensors", "sdxl/ip.bin"]
    assert wanted(ip_adapter, "models/ip.bin") == ["models/ip.bin"]
    assert wanted(ip_adapter, "models/image_encoder") == ["models/image_encoder/config.json", "models/image_encoder/model.safetensors"]


@pytest.mark.parametrize(("files", "empty"), [
    (["model_index.json", "unet/config.json", "unet/model.fp16.safetensors", "vae/config.json", "vae/model.bin"], "unet/config.json"),
    (["config.json", "tf_model.h5"], "config.json"),
    (["vae/config.json", "README.md"], "vae/config.json"),
])
def test_a_model_without_weights_that_are_read_is_refused(files, empty):
    with pytest.raises(FileNotFoundError, match=rf"^no weights that are read beside {empty}$"):
        wanted(files, "vae" if len(files) == 2 and "/" in files[0] else None)


def test_a_file_that_is_not_what_the_hub_says_is_refused(hub, tmp_path):
    hub.repositories["o/m"] = {"config.json": b"{}", "model.safetensors": b"whole"}
    for entry, kind in zip(fetch_model("o/m@main"), ("git digest", "sha256"), strict=True):
        blob = Path(entry.path).resolve()
        whole = blob.read_bytes()
        blob.write_bytes(b"wrong")
        with pytest.raises(OSError, match=rf"{entry.file}: its {kind} is .*delete the file and fetch again"):
            fetch_model("o/m@main")
        blob.write_bytes(whole)


def test_small_files_are_known_by_gits_own_digest(tmp_path):
    (tmp_path / "a").write_bytes(b"what is up, doc?")
    told = subprocess.run(["git", "hash-object", "--no-filters", tmp_path / "a"], capture_output=True, text=True, check=True).stdout.strip()
    assert git_digest(tmp_path / "a") == told


def test_a_hub_that_cannot_be_reached_is_said_in_a_line(monkeypatch):
    def unreachable(*_, **__):
        raise httpx.ConnectError("Name or service not known")

    monkeypatch.setattr("moma_lightning.fetch.HfApi.model_info", unreachable)
    with pytest.raises(SystemExit, match=r"(?s)fetch: o/m@main could not be loaded \(Name or service not known\).*Fetch it where the hub can be reached"):
        main(["fetch", "--models", "o/m@main"])


@pytest.mark.parametrize("options, message", [
    (["--models", "o/none@main"], "o/none@main could not be loaded .*not found"),
    (["--models", "o/m@gone"], "o/m@gone could not be loaded"),
    (["--models", "o/m@main/no/folder"], "holds no no/folder"),
    (["--models", "nonsense"], "not a hub name"),
    (["--experiment", "experiments/nowhere"], "no such experiment"),
    ([], "nothing to fetch"),
])
def test_what_cannot_be_fetched_is_said_in_a_line(hub, options, message, monkeypatch):
    hub.repositories["o/m"] = {"config.json": b"{}"}
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit, match=f"(?is)fetch: .*{message}"):
        main(["fetch", *options])
