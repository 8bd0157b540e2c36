"""The step that `experiments.true_size` takes, of the mini world's models (with one position in the middle block a softmax has no gradient)."""

from pathlib import Path

import pytest

from experiments import true_size


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_adapter_tensor_gets_a_gradient_and_no_other(capsys, checkpointing):
    true_size.main(Path("experiments/mini/stage2.yaml"), size=128, checkpointing=checkpointing)
    told = {line.partition("  ")[0].strip(): line for line in capsys.readouterr().out.splitlines() if "tensors" in line}
    for part in ("projector", "context side", "subject side"):
        tensors, trained, moved = (int(word) for word in told[part].replace(",", "").split() if word.isdigit())
        assert tensors == trained == moved > 0
    for part in ("UNet", "VAE", "text encoder", "image encoder"):
        assert "trained 0, with gradient 0" in told[part]
