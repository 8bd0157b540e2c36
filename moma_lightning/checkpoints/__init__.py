"""Checkpoint files: the project's own, IP-Adapter's, and the released MoMA file; read strictly, and converted into each other."""

from moma_lightning.checkpoints.adapter import adapter_state, holds_subject, load_adapter, load_into, save_adapter
from moma_lightning.checkpoints.formats import CheckpointError, read_adapter_file

__all__ = ["CheckpointError", "adapter_state", "holds_subject", "load_adapter", "load_into", "read_adapter_file", "save_adapter"]
