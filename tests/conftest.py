"""For every test file."""

import os
import sys

import torch

if not torch.cuda.is_available():  # Triton decides when it is imported, which diffusers does, that its kernels are interpreted
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.pop("HF_HUB_OFFLINE", None)  # huggingface_hub decides likewise, and the hub of the tests is on this machine

# Here, and not from within a package that the type checks' import hook looks after: it compiles what is imported there anew.
import diffusers  # noqa: F401
import lightning.pytorch  # noqa: F401
import pytest
import timm  # noqa: F401
import transformers  # noqa: F401

#: Files of long tests, which begin first: `make test` hands out files as they stand, and none of these must be left to one process at the end.
LONG = ("training/test_sharding", "experiments/test_yamls", "openimages/test_build_processes", "plan/test_plan", "tests/test_trends", "test_kill_drill",
        "openimages/test_build", "evaluation/test_processes", "evaluation/test_generation", "training/test_peaks", "experiments/test_cluster",
        "training/test_options")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((i for i, name in enumerate(LONG) if name in item.nodeid), len(LONG)))  # stable


@pytest.fixture(autouse=True)
def queries_are_picked_out(monkeypatch):
    """Tiny models have few queries, real ones many: tests are of what real ones do."""
    if "moma_lightning.models.attention" in sys.modules:
        monkeypatch.setattr("moma_lightning.models.attention.FEW_QUERIES", 0)


@pytest.fixture(autouse=True, scope="module")
def environment():
    """What a file leaves in the environment, the next one does not find: a sharded training in this process sets the port of a store that lives on."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
