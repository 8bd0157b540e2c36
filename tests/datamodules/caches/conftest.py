from pathlib import Path

import pytest

from datamodules.mini.export import export


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Shards of 24 training and 8 validation samples; not to be changed."""
    folder = tmp_path_factory.mktemp("data")
    export(folder, train_count=24, val_count=8, samples_per_shard=8)
    return folder / "shards"
