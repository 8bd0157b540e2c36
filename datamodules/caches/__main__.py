"""`python -m datamodules.caches --config experiments/<experiment>/stage1.yaml` (or stage2.yaml): cache what the stage's frozen models make of its shards.

Processes and devices are the YAML's trainer's; under srun say `--kill-on-bad-exit=1`, or the others wait for one that has failed. Run again, it makes
what is missing or stale.
"""

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import DDPStrategy

from datamodules.caches.make import CacheConfig, CacheMaker, finished
from moma_lightning.cli import MoMACLI
from moma_lightning.mendable import one_line
from moma_lightning.training.guards import ended_together


class CacheCLI(MoMACLI):
    """A stage as `fit` builds it from its YAML, under a Trainer that does nothing but run the processes."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_dataclass_arguments(CacheConfig, "cache")

    def before_instantiate_classes(self) -> None:
        """`fit` looks here for a run to go on with; a cache's finished shards are found one by one."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        told = {name: config[name] for name in ("accelerator", "devices", "num_nodes", "precision", "default_root_dir")}
        told |= {"use_distributed_sampler": False, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(**told, strategy="auto")
        if trainer.world_size == 1:
            return trainer
        return Trainer(**told, strategy=DDPStrategy(timeout=timedelta(days=30)))  # who has made its share waits for the others, however long they take


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cli = CacheCLI(run=False)
    config, data = cli._get(cli.config_init, "cache"), cli.datamodule.config
    out = Path(config.out or Path(cli.trainer.default_root_dir) / "cache")
    with ended_together(cli.trainer):
        cli.trainer.predict(CacheMaker(cli.model, data, config, out), return_predictions=False)
        cli.trainer.strategy.barrier("every process has made its share")
    if cli.trainer.is_global_zero:
        print(f"{out}: {finished(data, out)}")


if __name__ == "__main__":
    with one_line("cache"):
        main()
