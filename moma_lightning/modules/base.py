"""What both stages share: checkpoints that hold trained parameters only, and the optimizer."""

from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from moma_lightning import optim
from moma_lightning.models.trained_weights import check_fit


class TrainedPartModule(LightningModule):
    """A LightningModule most of which is frozen: its checkpoints hold what is trained, and are loaded back strictly."""

    def __init__(self, optimizer: optim.OptimizerConfig):
        super().__init__()
        self.strict_loading = False  # the frozen weights are not in checkpoints; on_load_checkpoint checks the others
        self.optimizer_config = optimizer

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the module, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name: checkpoint["state_dict"][name] for name in self.kept()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        source = self._trainer.ckpt_path if self._trainer is not None and self._trainer.ckpt_path else "the checkpoint"
        check_fit(str(source), checkpoint["state_dict"], self.kept())

    def configure_optimizers(self) -> Any:
        return optim.configure(self.named_parameters(), self.optimizer_config, self.trainer.estimated_stepping_batches)
