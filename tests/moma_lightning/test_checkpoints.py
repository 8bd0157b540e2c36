import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from moma_lightning.checkpoints import CheckpointError, adapter_state, load_adapter, save_adapter
from tests.tiny import tiny_adapter, tiny_base


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_round_trip_keeps_every_bit_and_the_variant(base, tmp_path, variant):
    adapter = tiny_adapter(base, variant)
    save_adapter(adapter, tmp_path, {"steps": 3})
    loaded = load_adapter(tmp_path, base.unet)
    assert loaded.variant == variant and loaded.has_subject
    assert all(torch.equal(a, b) for a, b in zip(adapter.state_dict().values(), loaded.state_dict().values(), strict=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["card.json", "moma.safetensors"]


def test_what_it_was_trained_on_stays_with_it(base, tmp_path):
    adapter = tiny_adapter(base)
    save_adapter(adapter, tmp_path / "a")
    assert load_adapter(tmp_path / "a", base.unet).trained_on is None
    save_adapter(adapter, tmp_path / "b", {"context": "image_encoder", "steps": 3})
    again = load_adapter(tmp_path / "b", base.unet)
    again.save_pretrained(tmp_path / "c")
    assert (again.trained_on, load_adapter(tmp_path / "c", base.unet).trained_on) == ("image_encoder", "image_encoder")
    assert json.loads((tmp_path / "c/card.json").read_text())["context"] == "image_encoder"


def test_another_number_of_image_tokens_is_read_of_the_file(base, tmp_path):
    adapter = tiny_adapter(base, num_tokens=2)
    save_adapter(adapter, tmp_path)
    loaded = load_adapter(tmp_path, base.unet)
    assert loaded.image_proj.num_tokens == json.loads((tmp_path / "card.json").read_text())["num_tokens"] == 2
    assert all(torch.equal(a, b) for a, b in zip(adapter.state_dict().values(), loaded.state_dict().values(), strict=True))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_ip_adapter_files_of_both_kinds(base, tmp_path, suffix):
    adapter = tiny_adapter(base)
    flat = adapter_state(adapter, subject=False)
    path = tmp_path / f"ip{suffix}"
    if suffix == ".bin":
        nested = {part: {n.removeprefix(part + "."): v for n, v in flat.items() if n.startswith(part + ".")} for part in ("image_proj", "ip_adapter")}
        torch.save(nested, path)
    else:
        save_file(flat, path)
    loaded = load_adapter(path, base.unet)
    assert torch.equal(loaded.image_proj.proj.weight, adapter.image_proj.proj.weight)
    assert all(torch.equal(loaded.context[i].to_k_ip.weight, layer.to_k_ip.weight) for i, layer in adapter.context.items())
    assert all(layer.lambda_ == 0 for layer in loaded.subject.values()) and not loaded.has_subject
    loaded.save_pretrained(tmp_path / "again")
    assert not load_adapter(tmp_path / "again", base.unet).has_subject and "# IP-Adapter" in (tmp_path / "again/README.md").read_text()


def test_wrong_shape_missing_and_unexpected_entries_are_named(base, tmp_path):
    save_adapter(tiny_adapter(base), tmp_path)
    path = tmp_path / "moma.safetensors"
    state = load_file(path)
    state["ip_adapter.1.to_k_ip.weight"] = torch.zeros(2, 3)
    del state["subject_adapter.0.to_k.weight"]
    state["subject_adapter.0.extra"] = torch.zeros(1)
    save_file(state, path)
    with pytest.raises(CheckpointError) as error:
        load_adapter(path, base.unet)
    for part in (str(path), "ip_adapter.1.to_k_ip.weight", "[2, 3]", "[16, 32]", "subject_adapter.0.to_k.weight", "subject_adapter.0.extra"):
        assert part in str(error.value)


def test_values_that_are_not_finite_are_named(base, tmp_path):
    adapter = tiny_adapter(base)
    with torch.no_grad():
        adapter.image_proj.proj.weight[0, 0] = float("nan")
    save_adapter(adapter, tmp_path)
    with pytest.raises(CheckpointError, match=r"image_proj.proj.weight hold values that are not finite"):
        load_adapter(tmp_path, base.unet)


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    save_adapter(tiny_adapter(tiny_base(channels=(8, 16))), tmp_path)
    with pytest.raises(CheckpointError, match="Use the base model that the adapter was trained on"):
        load_adapter(tmp_path, base.unet)


class Malicious:
    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


def test_a_malicious_pickle_is_refused(base, tmp_path, capsys):
    path = tmp_path / "evil.bin"
    path.write_bytes(pickle.dumps({"image_proj": Malicious()}))
    torch.save({"image_proj": Malicious()}, tmp_path / "evil2.bin")
    for name in ("evil.bin", "evil2.bin"):
        with pytest.raises(CheckpointError, match=name):
            load_adapter(tmp_path / name, base.unet)
    assert "code from a checkpoint ran" not in capsys.readouterr().out


def test_a_file_cut_short_is_refused(base, tmp_path):
    path = save_adapter(tiny_adapter(base), tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="moma.safetensors"):
        load_adapter(tmp_path, base.unet)


def test_a_missing_file_says_where_adapters_come_from(base, tmp_path):
    with pytest.raises(FileNotFoundError, match="stage 2 writes"):
        load_adapter(tmp_path / "nowhere.safetensors", base.unet)


def test_a_full_disk_leaves_the_old_file(base, tmp_path, monkeypatch):
    path = save_adapter(tiny_adapter(base), tmp_path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moma_lightning.checkpoints.formats.save_file", full)
    with pytest.raises(OSError, match=r"moma.safetensors was not written \(No space left on device\)"):
        save_adapter(tiny_adapter(base), tmp_path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
