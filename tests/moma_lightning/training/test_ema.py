import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from moma_lightning.training.ema import EMA


class Walk(LightningModule):
    """Its one trained weight goes 1 up each step; the frozen one stays. Remembers what validation and the export saw."""

    def __init__(self):
        super().__init__()
        self.weight, self.frozen = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.ones(1), requires_grad=False)
        self.validated, self.exported = [], None

    def training_step(self, batch, index):
        return -self.weight.sum()

    def validation_step(self, batch, index):
        self.validated.append(self.weight.item())

    def on_fit_end(self):
        self.exported = self.weight.item()

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], 1.0)


def fit(folder, steps=6, resume=None, accumulate=1, **options):
    module, ema, data = Walk(), EMA(decay=0.5), DataLoader(torch.zeros(3 * accumulate), batch_size=1)
    trainer = Trainer(accelerator="cpu", max_steps=steps, callbacks=[ema], logger=False, enable_progress_bar=False, enable_model_summary=False,
                      num_sanity_val_steps=0, enable_checkpointing=False, default_root_dir=folder, accumulate_grad_batches=accumulate, **options)
    trainer.fit(module, data, DataLoader(torch.zeros(1)), ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module, ema


def averages(steps: int) -> list[float]:
    """By hand: the decay's beginning is (1 + step) / (10 + step), and 0.5 from step 8 on."""
    average, values = 0.0, []
    for step in range(1, steps + 1):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * step
        values.append(average)
    return values


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_is_validated_and_exported_while_training_goes_on_without(tmp_path, accumulate):
    module, ema = fit(tmp_path, accumulate=accumulate)
    expected = averages(6)
    assert module.validated == pytest.approx([expected[2], expected[5]])
    assert module.exported == pytest.approx(expected[5])
    assert module.weight.item() == 6 and module.frozen.item() == 1
    assert list(ema.average) == ["weight"] and ema.average["weight"].item() == pytest.approx(expected[5])


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_hold_both_and_a_resumed_average_is_the_unbroken_one(tmp_path):
    fit(tmp_path, 3)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["state_dict"]["weight"].item() == 3 and saved["ema"]["weight"].item() == pytest.approx(averages(3)[-1])
    module, ema = fit(tmp_path, 12, resume=tmp_path / "last.ckpt")
    assert ema.average["weight"].item() == pytest.approx(averages(12)[-1]) and module.weight.item() == 12


@pytest.mark.filterwarnings("ignore")
def test_another_models_average_is_refused(tmp_path):
    fit(tmp_path, 3)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    saved["ema"] = {"other": torch.zeros(1)}
    torch.save(saved, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="of other parameters"):
        fit(tmp_path, 6, resume=tmp_path / "last.ckpt")


def test_decay_is_checked():
    with pytest.raises(ValueError, match=r"decay 1.0 is not in \[0, 1\)"):
        EMA(1.0)


def test_the_average_goes_to_where_the_module_was_moved_after_it_was_read(tmp_path):
    module, ema = Walk(), EMA(0.5)
    ema.on_load_checkpoint(Trainer(logger=False), module, {"ema": {"weight": torch.ones(1)}})
    ema.on_train_start(Trainer(logger=False), module.to("meta"))
    assert ema.average["weight"].device.type == "meta"


def test_a_checkpoint_without_an_average_starts_one_at_its_weights():
    module, ema = Walk(), EMA(0.5)
    ema.on_fit_start(Trainer(logger=False), module)
    with torch.no_grad():
        module.weight.fill_(3.0)  # as sharded training reads a checkpoint: after `on_fit_start`
    ema.on_load_checkpoint(Trainer(logger=False), module, {})
    assert ema.average["weight"].item() == 3.0
