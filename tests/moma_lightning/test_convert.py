"""`python -m moma_lightning convert`: every pair of formats, what is left out, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from moma_lightning.__main__ import main
from moma_lightning.checkpoints import load_adapter, save_adapter
from moma_lightning.foundation import load_mllm
from moma_lightning.models.image_feature_decoder import ImageFeatureDecoder
from moma_lightning.models.preprocess import preprocess
from tests.moma_lightning.test_checkpoint_formats import tiny_released
from tests.tiny import tiny_adapter, tiny_base


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture
def released(base, tmp_path):
    path = tmp_path / "attn_adapters_projectors.th"
    torch.save(tiny_released(tiny_adapter(base)), path)
    return path


def convert(source, target, *options: str) -> None:
    assert main(["convert", "--from", str(source), "--to", str(target), *map(str, options)]) == 0


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_released_to_native_and_back_is_the_same_file(released, tmp_path):
    convert(released, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "again.th")
    before, after = (torch.load(path, weights_only=True) for path in (released, tmp_path / "again.th"))
    assert before.keys() == after.keys() and all(same(before[part], after[part]) for part in before)


def test_released_to_native_draws_with_the_same_adapter(base, released, tmp_path):
    convert(released, tmp_path / "native")
    a, b = (load_adapter(path, base.unet) for path in (released, tmp_path / "native/adapter"))
    assert same(a.state_dict(), b.state_dict()) and a.variant == b.variant == "released"
    assert json.loads((tmp_path / "native/adapter/card.json").read_text()) == {"variant": "released", "num_tokens": 4, "subject": True}
    options = json.loads((tmp_path / "native/image_feature_decoder/config.json").read_text())
    assert (options["embed_dim"], options["hidden_size"]) == (24, 40)
    assert options["decoder"] == {"template": "released", "learnable_token": False, "trainable": [r"^mapping\."]}


@pytest.mark.parametrize("first, second", [("ip.bin", "ip.safetensors"), ("ip.safetensors", "ip.bin")])
def test_the_context_side_survives_both_ip_adapter_formats(base, released, tmp_path, first, second, capsys):
    convert(released, tmp_path / first)
    assert "left out subject side" in capsys.readouterr().out
    convert(tmp_path / first, tmp_path / second)
    convert(tmp_path / second, tmp_path / "native")
    a, b = (load_adapter(path, base.unet) for path in (released, tmp_path / "native/adapter"))
    assert same(a.context.state_dict(), b.context.state_dict()) and same(a.image_proj.state_dict(), b.image_proj.state_dict())
    assert all(layer.lambda_ == 0 for layer in b.subject.values())
    assert {name.partition(".")[0] for name in load_file(tmp_path / "ip.safetensors")} == {"image_proj", "ip_adapter"}
    assert set(torch.load(tmp_path / "ip.bin", weights_only=True)) == {"image_proj", "ip_adapter"}


def original_llava(mllm) -> dict[str, torch.Tensor]:
    """A transformers LLaVA's weights under the names of LLaVA's authors, with a vocabulary that lacks the 64 added rows."""
    state = {}
    for name, value in mllm.model.state_dict().items():
        name = name.replace("multi_modal_projector.linear_1", "mm_projector.0").replace("multi_modal_projector.linear_2", "mm_projector.2")
        name = name.replace("language_model.", "").replace("vision_tower.", "vision_tower.vision_tower.")
        state[f"model.{name}"] = value.clone()
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:-64]
    return state | {"lm_head.weight": torch.zeros(2, 2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}


@pytest.fixture
def released_mllm(tiny_foundation, tmp_path):
    """Two shards and their index, as LLaVA's authors ship them. Every weight differs from the foundation's, and the image token lies in the added rows."""
    mllm, processor = load_mllm(tiny_foundation)
    with torch.no_grad():
        for name, parameter in mllm.named_parameters():
            if "vision_tower" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
        mllm.get_input_embeddings().weight[-64:] = 0  # the rows that the released vocabulary lacks
    folder, state = tmp_path / "mllm", original_llava(mllm)
    folder.mkdir()
    names, weight_map = sorted(state), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        torch.save({name: state[name] for name in part}, folder / f"pytorch_model-0000{i}-of-00002.bin")
        weight_map |= dict.fromkeys(part, f"pytorch_model-0000{i}-of-00002.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder, mllm, processor


def test_the_released_mllm_becomes_the_decoders_own(released, released_mllm, tiny_foundation, tmp_path):
    """Mapping and MLLM from the released files, on the foundation's LLaVA, predict what the released LLaVA itself does."""
    folder, mllm, processor = released_mllm
    nested = torch.load(released, weights_only=True)
    nested["llm_mapping"] = {f"mapping.{n}_proj.weight": torch.randn(12, 12 if n == "down" else 24) for n in ("gate", "up", "down")}
    torch.save(nested, released)
    convert(released, tmp_path / "native", "--mllm", folder)
    decoder = ImageFeatureDecoder.from_pretrained(tmp_path / "native/image_feature_decoder", tiny_foundation)
    picture = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        predicted = decoder(picture, ["cat"], ["a cat on the beach"])
        text = "USER: <image>\n A photo of a cat. Describe a new image of the same cat in: a cat on the beach. ASSISTANT: *"
        inputs = processor(images=[torch.zeros(3, 16, 16)], text=[text], return_tensors="pt")
        inputs["pixel_values"] = preprocess(picture, processor.image_processor)
        hidden = mllm.model(**inputs).last_hidden_state[0, -1]
        gate, up, down = (nested["llm_mapping"][f"mapping.{n}_proj.weight"] for n in ("gate", "up", "down"))
        expected = down @ (torch.nn.functional.silu(gate @ hidden) * (up @ hidden))
    torch.testing.assert_close(predicted[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spoil, message", [
    (lambda folder: (folder / "pytorch_model-00002-of-00002.bin").unlink(), "lacks pytorch_model-00002-of-00002.bin"),
    (lambda folder: torch.save({"model.what": torch.zeros(1)}, folder / "pytorch_model-00001-of-00002.bin"), "unexpected entry model.what"),
    (lambda folder: [path.unlink() for path in folder.iterdir()], "holds neither model.safetensors nor"),
])
def test_a_damaged_mllm_is_named(released, released_mllm, tmp_path, spoil, message):
    spoil(released_mllm[0])
    with pytest.raises(SystemExit, match=f"convert: .*{message}"):
        convert(released, tmp_path / "native", "--mllm", released_mllm[0])


def test_what_a_format_cannot_hold_is_refused_or_told(base, released, tmp_path):
    save_adapter(tiny_adapter(base), tmp_path / "stage2/adapter")
    with pytest.raises(SystemExit, match="must hold the mapping, which the source does not .the mapping: --decoder"):
        convert(tmp_path / "stage2", tmp_path / "x.th")
    convert(released, tmp_path / "ip.bin")
    with pytest.raises(SystemExit, match="must hold the subject side and the mapping"):
        convert(tmp_path / "ip.bin", tmp_path / "x.th")
    save_adapter(tiny_adapter(base, "paper"), tmp_path / "paper/adapter")
    with pytest.raises(SystemExit, match="paper variant cannot be written as a released file"):
        convert(tmp_path / "paper", tmp_path / "x.th")
    assert not (tmp_path / "x.th").exists()


def test_a_trained_mllm_that_the_released_file_has_no_place_for_is_told(base, released, tmp_path, capsys):
    """Its mapping was trained together with it and is of little use alone."""
    convert(released, tmp_path / "run")
    folder = tmp_path / "run/image_feature_decoder"
    save_file(load_file(folder / "model.safetensors") | {"mllm.language_model.norm.weight": torch.ones(40)}, folder / "model.safetensors")
    capsys.readouterr()
    convert(tmp_path / "run", tmp_path / "x.th")
    assert "left out MLLM 0.00 M (1 entries, float32): the format of x.th does not hold them" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"lora": {"rank": 2}}, {"trainable": [r"^mllm\.multi_modal_projector\.", r"^mapping\."]}])
def test_a_decoders_own_options_go_with_it_into_a_folder(released, tmp_path, options):
    convert(released, tmp_path / "run")
    path = tmp_path / "run/image_feature_decoder/config.json"
    card = json.loads(path.read_text())
    path.write_text(json.dumps(card | {"decoder": card["decoder"] | options}))
    convert(tmp_path / "run", tmp_path / "again", "--decoder", path.parent)
    assert json.loads((tmp_path / "again/image_feature_decoder/config.json").read_text())["decoder"] == card["decoder"] | options


def test_an_ip_adapter_with_another_projector_is_no_native_folder(tmp_path):
    torch.save({"image_proj": {"latents": torch.zeros(1)}, "ip_adapter": {"1.to_k_ip.weight": torch.zeros(1)}}, tmp_path / "plus.bin")
    with pytest.raises(SystemExit, match="convert: .*holds no image_proj.norm.weight and no image_proj.proj.weight: not an IP-Adapter .the plain one."):
        convert(tmp_path / "plus.bin", tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_an_adapter_that_is_not_whole_is_refused_before_anything_is_written(released, tmp_path):
    convert(released, tmp_path / "source")
    path, zeros = tmp_path / "source/adapter/moma.safetensors", torch.zeros
    whole = load_file(path)
    for spoil, named in [
        ({"image_proj.norm.bias": None}, "image_proj.norm.bias: missing"),
        ({"image_proj.norm.bias": zeros(3)}, r"image_proj.norm.bias: shape \[3\], expected \[32\]"),
        ({"ip_adapter.999.to_k_ip.weight": zeros(2, 32)}, "ip_adapter.999.to_k_ip.weight: not expected"),
        ({"ip_adapter.3.to_k_ip.weight": None}, "ip_adapter.3.to_k_ip.weight: missing"),
        ({f"ip_adapter.5.to_{kv}_ip.weight": None for kv in "kv"}, "ip_adapter.5.to_k_ip.weight: missing"),
        ({"ip_adapter.1.to_v_ip.weight": zeros(3, 3)}, r"ip_adapter.1.to_v_ip.weight: shape \[3, 3\], expected \[16, 32\]"),
        ({f"ip_adapter.1.to_{kv}_ip.weight": zeros(16, 9) for kv in "kv"}, r"ip_adapter.1.to_k_ip.weight: shape \[16, 9\], expected \[16, 32\]"),
        ({"subject_adapter.0.lambda_": None}, "subject_adapter.0.lambda_: missing"),
        ({"subject_adapter.0.to_k.weight": zeros(16, 9)}, r"subject_adapter.0.to_k.weight: shape \[16, 9\], expected \[16, 16\]"),
        ({"token.weight": zeros(1)}, "token.weight: not expected"), ({"loose": zeros(2, 2)}, "loose: not expected"),
    ]:
        save_file({name: value for name, value in (whole | spoil).items() if value is not None}, path)
        with pytest.raises(SystemExit, match=rf"(?s)convert: {tmp_path / 'source'} does not fit.*\n  {named}.*not a whole adapter"):
            convert(tmp_path / "source", tmp_path / "x.bin")
    nested = torch.load(released, weights_only=True)
    del nested["llm_mapping"]["mapping.up_proj.weight"]
    torch.save(nested, released)
    with pytest.raises(SystemExit, match=r"mapping.up_proj.weight: missing"):
        convert(released, tmp_path / "x.bin")
    assert not (tmp_path / "x.bin").exists()


def test_a_decoder_that_the_released_file_cannot_describe_is_refused(base, tmp_path):
    save_adapter(tiny_adapter(base), tmp_path / "run/adapter")
    (tmp_path / "run/image_feature_decoder").mkdir()
    (tmp_path / "run/image_feature_decoder/config.json").write_text(json.dumps({"embed_dim": 4, "decoder": {"template": "paper", "learnable_token": None}}))
    with pytest.raises(SystemExit, match="the paper's template or a learnable token"):
        convert(tmp_path / "run", tmp_path / "x.th")
