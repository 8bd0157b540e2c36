"""A model of which something is missing is refused by name: transformers draws what it lacks at random, and goes on."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluation.metrics import ClipConfig
from evaluation.metrics.encoders import build_encoder
from moma_lightning.foundation import load_base, load_image_encoder, load_mllm
from moma_lightning.models.caption_encoder import CaptionEncoder
from moma_lightning.segmentation import SamMasker
from moma_lightning.whole import load_whole


def without_a_weight(folder: Path) -> str:
    """The name of the weight that its file lacks now."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[len(tensors) // 2]
    save_file({key: value for key, value in tensors.items() if key != name}, path, {"format": "pt"})
    return name


@pytest.fixture
def copied(foundation, tmp_path):
    """The foundation in folders that a test may damage, and CLIP beside them."""
    shutil.copytree(foundation.base, tmp_path / "base")
    for part in ("llava", "image_encoder", "clip"):
        shutil.copytree(Path(foundation.mllm).parent / part, tmp_path / part)
    return replace(foundation, base=str(tmp_path / "base"), mllm=str(tmp_path / "llava"), image_encoder=str(tmp_path / "image_encoder"))


def test_whole_models_are_read(copied):
    load_base(copied), load_image_encoder(copied), load_mllm(copied)
    CaptionEncoder.from_pretrained(str(Path(copied.mllm).parent / "clip"))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_base_that_lacks_a_weight_is_refused(copied, part):
    without_a_weight(Path(copied.base) / part)
    with pytest.raises(ValueError, match=f"{copied.base} lacks [12] weights of the model"):
        load_base(copied)


@pytest.mark.parametrize(("part", "load"), [("llava", load_mllm), ("image_encoder", load_image_encoder)])
def test_a_transformer_that_lacks_a_weight_is_refused(copied, part, load):
    name = without_a_weight(Path(copied.mllm).parent / part)
    with pytest.raises(ValueError, match=rf"{part} lacks 1 weights of the model \(.*{name.split('.')[-1]}"):
        load(copied)


def test_a_head_that_nothing_is_read_of_may_be_missing(copied):
    (path,) = Path(copied.mllm).glob("*.safetensors")
    tensors = load_file(path)
    assert any(name.startswith(("lm_head", "language_model.lm_head")) for name in tensors)
    save_file({name: value for name, value in tensors.items() if "lm_head" not in name}, path, {"format": "pt"})
    load_mllm(copied)


def test_only_what_begins_as_said_may_be_missing():
    lacking = SimpleNamespace(from_pretrained=lambda **options: ("model", {"missing_keys": {"lm_head.weight", *also}}))
    also = ()
    assert load_whole(lacking, "llava", {}, ("lm_head.",)) == "model"
    also = ("model.lm_head.weight",)
    with pytest.raises(ValueError, match=r"llava lacks 1 weights of the model \(model.lm_head.weight\)"):
        load_whole(lacking, "llava", {}, ("lm_head.",))


def test_a_text_encoder_of_an_unknown_class_is_told(copied):
    path = Path(copied.base) / "model_index.json"
    path.write_text(path.read_text().replace("CLIPTextModel", "FlaxCLIPTextModel"))
    with pytest.raises(ValueError, match="names FlaxCLIPTextModel as text_encoder"):
        load_base(copied)


def test_a_tokenizer_without_its_words_is_refused(copied):
    (Path(copied.base) / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(ValueError, match="its tokenizer knows . tokens"):
        load_base(copied)


def test_judges_are_whole_or_refused(copied):
    clip = Path(copied.mllm).parent / "clip"
    build = lambda: build_encoder(ClipConfig(str(clip), revision=None))  # noqa: E731
    shutil.copy(Path(copied.image_encoder) / "preprocessor_config.json", clip)
    before = (clip / "tokenizer.json").read_bytes()
    (clip / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="its tokenizer knows . tokens"):
        build()
    (clip / "tokenizer.json").write_bytes(before)
    without_a_weight(clip)
    with pytest.raises(ValueError, match="clip lacks 1 weights"):
        build()


@pytest.mark.parametrize(("part", "load"), [("llava", load_mllm), ("image_encoder", load_image_encoder)])
def test_a_file_cut_short_is_named(copied, part, load):
    (path,) = (Path(copied.mllm).parent / part).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{part}: one of its files is not a whole safetensors file"):
        load(copied)


def test_sams_files_are_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        SamMasker.from_pretrained(tmp_path)
    torch.save({"a": print}, tmp_path / "sam_vit_b.pth")
    with pytest.raises(ValueError, match="sam_vit_b.pth was refused: a pickle of more than tensors"):
        SamMasker.from_pretrained(tmp_path / "sam_vit_b.pth")
