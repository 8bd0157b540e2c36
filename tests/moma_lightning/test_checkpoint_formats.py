"""Every layout at Stable Diffusion 1.5's own shapes, built here from the formats' descriptions, not from the code's."""

import os
import pickle
import resource

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from moma_lightning.checkpoints import CheckpointError, adapter_state, load_adapter, read_adapter_file, save_adapter
from moma_lightning.checkpoints.formats import write_pickle, write_safetensors
from moma_lightning.models.mapping import Mapping
from moma_lightning.models.trained_weights import check_fit
from tests.tiny import tiny_adapter, tiny_base
from tests.true_size import count, sd15_adapter

#: Channels of the 16 attention blocks in the order of unet.attn_processors: down, up, mid.
CHANNELS = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280]


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float16)


def ip_adapter_sd15() -> dict[str, dict[str, torch.Tensor]]:
    projector = {"proj.weight": half(3072, 1024), "proj.bias": half(3072), "norm.weight": half(768), "norm.bias": half(768)}
    layers = {f"{2 * i + 1}.to_{kv}_ip.weight": half(c, 768) for i, c in enumerate(CHANNELS) for kv in "kv"}
    return {"image_proj": projector, "ip_adapter": layers}


def released() -> dict[str, dict[str, torch.Tensor]]:
    """attn_adapters_projectors.th: a projector in bfloat16, adapters in float16, the mapping in bfloat16."""
    ip = ip_adapter_sd15()
    layers = dict(ip["ip_adapter"])
    for i, c in enumerate(CHANNELS):
        layers |= {f"{2 * i}.to_k_ip.weight": half(c, c), f"{2 * i}.to_v_ip.weight": half(c, c), f"{2 * i}.scale_learnable": half(1)}
    mapping = {f"mapping.{n}_proj.weight": half(1024, 4096 if n != "down" else 1024).bfloat16() for n in ("gate", "up", "down")}
    return {"projectors": {n: v.bfloat16() for n, v in ip["image_proj"].items()}, "self_cross_attentions": layers, "llm_mapping": mapping}


@pytest.fixture(scope="module")
def adapter():
    return sd15_adapter()


def test_parameter_counts_are_the_papers(adapter):
    """43.95 M in the adapters, 19.17 M of them context and 24.78 M subject; 3.15 M in the projector; 9.44 M in the mapping."""
    assert count(adapter.context.parameters()) == 19_169_280 and count(adapter.subject.parameters()) == 24_780_816
    assert count(adapter.image_proj.parameters()) == 3_150_336
    assert sum(v.numel() for v in released()["llm_mapping"].values()) == 9_437_184
    assert sum(v.numel() for part in released().values() for v in part.values()) == pytest.approx(56.5e6, rel=1e-3)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_ip_adapter_files_have_the_adapters_names_and_shapes(adapter, tmp_path, suffix):
    nested, path = ip_adapter_sd15(), tmp_path / f"ip-adapter_sd15{suffix}"
    if suffix == ".bin":
        torch.save(nested, path)
    else:
        save_file({f"{part}.{name}": value for part, entries in nested.items() for name, value in entries.items()}, path)
    assert 44.5e6 < path.stat().st_size < 44.8e6
    fit = check_fit(str(path), read_adapter_file(path)[0], adapter_state(adapter, subject=False))
    assert fit.read == 36 and len(fit.retyped) == 36


def test_the_released_file_has_the_adapters_names_and_shapes(adapter, tmp_path):
    torch.save(released(), tmp_path / "attn_adapters_projectors.th")
    state, _ = read_adapter_file(tmp_path / "attn_adapters_projectors.th")
    mapping = {name: state.pop(name) for name in list(state) if name.startswith("mapping.")}
    assert check_fit("", state, adapter_state(adapter)).read == 84
    check_fit("", mapping, nn.ModuleDict({"mapping": Mapping(4096, 1024)}).state_dict())


def tiny_released(adapter) -> dict:
    """The released layout of a small adapter, name by name."""
    layers = {f"{i}.to_{kv}_ip.weight": getattr(layer, f"to_{kv}").weight for i, layer in adapter.subject.items() for kv in "kv"}
    layers |= {f"{i}.scale_learnable": layer.lambda_ for i, layer in adapter.subject.items()}
    layers |= {f"{i}.to_{kv}_ip.weight": getattr(layer, f"to_{kv}_ip").weight for i, layer in adapter.context.items() for kv in "kv"}
    mapping = {f"mapping.{n}_proj.weight": torch.randn(24, 24 if n == "down" else 40) for n in ("gate", "up", "down")}
    return {"projectors": dict(adapter.image_proj.state_dict()), "self_cross_attentions": {n: v.detach() for n, v in layers.items()}, "llm_mapping": mapping}


def test_a_released_file_is_the_adapter_it_was_made_of(tmp_path):
    base = tiny_base()
    made, path = tiny_adapter(base), tmp_path / "attn_adapters_projectors.th"
    torch.save(tiny_released(made), path)
    loaded = load_adapter(path, base.unet)
    assert loaded.variant == "released"
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), loaded.state_dict().values(), strict=True))


def test_what_was_read_is_told(tmp_path, caplog):
    """Half precision is read into single: said, not silent."""
    base, path = tiny_base(), tmp_path / "ip.safetensors"
    state = adapter_state(tiny_adapter(base), subject=False)
    save_file({name: value.half() for name, value in state.items()}, path)
    with caplog.at_level("INFO"):
        load_adapter(path, base.unet)
    assert f"{path}: {len(state)} entries, 0 missing, 0 unexpected, 0 of another shape, {len(state)} of another dtype" in caplog.text
    assert "image_proj.proj.weight: float16, read as float32" in caplog.text


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_a_pickle_with_code_is_refused_and_its_code_does_not_run(tmp_path):
    nested = tiny_released(tiny_adapter(tiny_base())) | {"llm_mapping": {"mapping.gate_proj.weight": Payload(str(tmp_path / "ran"))}}
    torch.save(nested, tmp_path / "evil.th")
    with pytest.raises(CheckpointError, match=r"evil.th was refused: a pickle of more than tensors .*mkdir.* can run code"):
        read_adapter_file(tmp_path / "evil.th")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Payload(str(tmp_path / "ran"))))
    assert (tmp_path / "ran").exists(), "the payload itself works"


@pytest.mark.parametrize("keep", [0, 1, 300, -200])
@pytest.mark.parametrize("name", ["a.th", "a.bin", "moma.safetensors"])
def test_a_truncated_file_is_named(tmp_path, name, keep):
    base, path = tiny_base(), tmp_path / name
    adapter = tiny_adapter(base)
    if name == "moma.safetensors":
        save_adapter(adapter, tmp_path)
    else:
        torch.save(tiny_released(adapter), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{name} .*(fetch or write it again|from its authors again)"):
        load_adapter(path, base.unet)


def test_a_trainings_checkpoint_is_no_adapter(tmp_path):
    torch.save({"pytorch-lightning_version": "2.6", "state_dict": {}}, tmp_path / "last.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    (tmp_path / "folder.ckpt/.metadata").touch()
    for name in ("last.ckpt", "folder.ckpt"):
        with pytest.raises(CheckpointError, match=rf"{name} is a training's checkpoint.*max_steps"):
            read_adapter_file(tmp_path / name)


@pytest.mark.parametrize("content, message", [
    ({"state_dict": {}}, "holds state_dict; expected image_proj, ip_adapter or projectors"),
    ({"image_proj": {}, "ip_adapter": {}, "faceid": {}}, "holds faceid, image_proj, ip_adapter"),
    ([torch.zeros(1)], "holds no dict"),
    ({"image_proj": {"proj.weight": 3}, "ip_adapter": {}}, "image_proj.proj.weight hold no tensors"),
    ({"image_proj": torch.zeros(1), "ip_adapter": {}}, "image_proj hold no entries"),
    ({"image_proj": {"latents": torch.zeros(1)}, "ip_adapter": {}}, "not an IP-Adapter .the plain one."),
])
def test_another_layout_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=f"x.bin.*{message}"):
        load_adapter(tmp_path / "x.bin", tiny_base().unet)


def test_an_entry_that_the_released_layout_does_not_have_is_reported(tmp_path):
    base = tiny_base()
    nested = tiny_released(tiny_adapter(base))
    nested["self_cross_attentions"]["0.to_q_ip.weight"] = torch.zeros(1)
    del nested["self_cross_attentions"]["3.to_v_ip.weight"]
    torch.save(nested, tmp_path / "x.th")
    with pytest.raises(CheckpointError, match=r"(?s)ip_adapter.3.to_v_ip.weight: missing.*subject_adapter.0.to_q_ip.weight: not expected"):
        load_adapter(tmp_path / "x.th", base.unet)


@pytest.mark.parametrize("write", ["safetensors", "pickle"])
def test_a_disk_that_fills_up_half_way_leaves_the_previous_file(tmp_path, write):
    """The operating system refuses the write in the middle of the file, as a full disk does."""
    path, state = tmp_path / "x", {"a": torch.randn(50_000)}
    save = (lambda: write_safetensors(path, state, {})) if write == "safetensors" else (lambda: write_pickle(path, {"part": state}))
    save()
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{path} was not written .*a file of that name from before is unchanged"):
            save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
