"""A module of one weight, data of a few numbers, and their YAML: what the command line's tests train."""

import csv
import os

import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader


class OneWeight(LightningModule):
    """Each step adds 1 to the weight: its value tells how many steps were trained."""

    def __init__(self, slope: float = 1.0, die_at: int = -1, die_in_validation: bool = False, echo: str = "", strict: str = "one",
                 raise_at: int = -1):
        super().__init__()
        self.raise_at = raise_at
        self.slope, self.die_at, self.die_in_validation, self.echo, self.strict = slope, die_at, die_in_validation, echo, strict
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def on_load_checkpoint(self, checkpoint):
        if self.strict != "one":
            raise ValueError("was trained with other options")

    def validation_step(self, batch, batch_idx):
        if self.die_in_validation and not self.trainer.sanity_checking:
            os._exit(9)
        self.log("val/weight", self.weight.detach())

    def training_step(self, batch, batch_idx):
        if self.global_step == self.die_at:
            os._exit(9)
        if self.global_step == self.raise_at:
            raise RuntimeError("cut")
        self.log("train/loss", self.weight.detach())
        return -self.slope * self.weight

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Numbers(LightningDataModule):
    """Training and validation of the same few numbers."""

    def __init__(self, count: int = 8):
        super().__init__()
        self.count = count

    def train_dataloader(self):
        return DataLoader(torch.arange(float(self.count)).tolist(), batch_size=1)

    val_dataloader = train_dataloader


def config(folder, **trainer):
    path = folder / "stage.yaml"
    path.write_text(yaml.safe_dump({
        "trainer": {"default_root_dir": str(folder / "runs/tiny/stage1"), "max_steps": 5, "accelerator": "cpu", "log_every_n_steps": 1,
                    "enable_progress_bar": False, "enable_model_summary": False} | trainer,
        "checkpoint": {"every_n_train_steps": 2},
        "model": {"class_path": f"{__name__}.OneWeight"},
        "data": {"class_path": f"{__name__}.Numbers", "init_args": {"count": 8}},
    }))
    return path


def last_step(folder) -> int:
    return torch.load(folder / "runs/tiny/stage1/checkpoints/last.ckpt", weights_only=True)["global_step"]


def logged_steps(folder) -> list[int]:
    with (folder / "runs/tiny/stage1/metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]


def validated_steps(folder) -> list[int]:
    with (folder / "runs/tiny/stage1/metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["val/weight"]]


def early_stopping(metric: str, **options) -> dict:
    return {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": metric} | options}
