"""The mini world's models by name, for benchmarks, recipes and tests; commands read the same YAML."""

from dataclasses import replace
from typing import Any

from moma_lightning.foundation import FoundationConfig

MINI = "experiments/mini/foundation"
#: Its protocols (evaluation/protocols.py).
PROTOCOL, FULL_PROTOCOL = "experiments/mini/protocol.yaml", "experiments/mini/protocol_full.yaml"


def mini_foundation(**changes: Any) -> FoundationConfig:
    """experiments/mini/foundation.yaml, with `changes` of its fields."""
    return replace(FoundationConfig.from_yaml("experiments/mini/foundation.yaml"), **changes)
