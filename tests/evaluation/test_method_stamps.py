"""What a picture's stamp says of its method: the class, its options and the digests of what it reads."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from evaluation.methods import IpAdapter, Method, Models, Moma, StockIpAdapter, TextOnly
from experiments.mini.models import MINI, mini_foundation
from moma_lightning.digests import content_digest


def test_weights_are_named_by_their_content(tmp_path):
    for name in ("base", "ip", "adapter", "decoder", "mllm", "clip"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w").write_text(name)
    foundation = mini_foundation(base=str(tmp_path / "base"), image_encoder=str(tmp_path / "clip"), mllm=str(tmp_path / "mllm"),
                                  ip_adapter=str(tmp_path / "ip"), sam=None)

    def models():
        return Models(foundation, str(tmp_path / "adapter"), str(tmp_path / "decoder"))

    before = {type(m): m.weights(models()) for m in (TextOnly(), IpAdapter(), Moma())}
    (tmp_path / "mllm" / "w").write_text("other")
    after = {type(m): m.weights(models()) for m in (TextOnly(), IpAdapter(), Moma())}
    assert before[TextOnly] == after[TextOnly]
    assert before[IpAdapter] == after[IpAdapter]
    assert {k for k in before[Moma] if before[Moma][k] != after[Moma][k]} == {"mllm"}
    assert before[Moma]["adapter"] == content_digest(tmp_path / "adapter")


def test_what_a_base_in_one_file_is_read_with_is_stamped(tmp_path):
    (tmp_path / "base.safetensors").write_text("weights")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    a, b = (TextOnly().weights(Models(mini_foundation(base=str(tmp_path / "base.safetensors"), base_config=str(tmp_path / name)))) for name in ("a", "b"))
    assert a["base"] == b["base"] and a["base_config"] != b["base_config"]


def test_another_vae_is_stamped():
    plain, other = (TextOnly().weights(Models(mini_foundation(vae=vae))) for vae in (None, f"{MINI}/base/vae"))
    assert plain["vae"] is None and other == plain | {"vae": content_digest(Path(MINI, "base/vae"))}


def test_a_methods_own_base_is_stamped():
    models = Models(mini_foundation(), f"{MINI}/ip_adapter", f"{MINI}/llava")
    own, other = (Moma(base=base).weights(models) for base in (None, f"{MINI}/base/vae"))
    assert own["base"] == content_digest(Path(MINI, "base")) and other["base"] == content_digest(Path(MINI, "base/vae"))


@pytest.mark.parametrize("change", [{"mllm_dtype": "bfloat16"}, {"mllm_quantization": "4bit"}])
def test_the_mllms_precision_is_stamped_where_it_is_used_and_not_the_default(tmp_path, change):
    """Stamps from before these names, made with the default, stay as they were."""
    for name in ("base", "ip", "adapter", "decoder", "mllm", "clip"):
        (tmp_path / name).mkdir()
    foundation = mini_foundation(base=str(tmp_path / "base"), image_encoder=str(tmp_path / "clip"), mllm=str(tmp_path / "mllm"),
                                  ip_adapter=str(tmp_path / "ip"), sam=None)
    plain, changed = (Models(f, str(tmp_path / "adapter"), str(tmp_path / "decoder")) for f in (foundation, replace(foundation, **change)))
    for method in (Moma(), StockIpAdapter()):
        assert not {"mllm_dtype", "mllm_quantization"} & method.weights(plain).keys()
        assert method.weights(changed) == method.weights(plain) | change
    assert TextOnly().weights(changed) == TextOnly().weights(plain)
    assert IpAdapter().weights(changed) == IpAdapter().weights(plain)


@dataclass
class Mine(TextOnly):
    strength: float = 1.0


def test_a_class_of_ones_own_is_stamped_with_where_it_is_from_and_its_source(monkeypatch):
    """A class by a shipped one's name would get the other's pictures, and an edited one those from before."""
    assert TextOnly().options()["kind"] == "TextOnly"
    own = Mine().options()
    assert own["kind"].startswith(f"{Mine.__module__}.Mine ") and own["strength"] == 1.0
    monkeypatch.setattr("inspect.getsource", lambda kind: "edited")
    assert Mine().options()["kind"] != own["kind"]


def test_a_method_that_is_no_dataclass_is_told():
    class Undecorated(Method):
        def generate(self, subject, reference, tasks):
            return []

    with pytest.raises(ValueError, match="Undecorated: a method is a dataclass"):
        Undecorated().options()
