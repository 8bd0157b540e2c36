"""The step that `experiments.true_size` takes, at a size that fits a test (with one position in the middle block a softmax has no gradient)."""

import pytest

from experiments import true_size


@pytest.fixture
def small(monkeypatch):
    narrow = {"block_out_channels": (32, 64, 64, 64)}
    monkeypatch.setattr(true_size, "UNET", {**true_size.UNET, **narrow, "cross_attention_dim": 32, "sample_size": 8})
    monkeypatch.setattr(true_size, "VAE", {**true_size.VAE, **narrow, "sample_size": 64})
    monkeypatch.setattr(true_size, "TEXT", {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2})
    monkeypatch.setattr(true_size, "VIT_H", {**true_size.TEXT, "patch_size": 14, "projection_dim": 48})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_adapter_tensor_gets_a_gradient_and_no_other(small, capsys, checkpointing):
    true_size.main(size=128, checkpointing=checkpointing)
    told = {line.partition("  ")[0].strip(): line for line in capsys.readouterr().out.splitlines() if "tensors" in line}
    for part in ("projector", "context side", "subject side"):
        tensors, trained, moved = (int(word) for word in told[part].replace(",", "").split() if word.isdigit())
        assert tensors == trained == moved > 0
    for part in ("UNet", "VAE", "text encoder", "image encoder"):
        assert "trained 0, with gradient 0" in told[part]
