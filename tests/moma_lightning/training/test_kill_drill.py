"""A short drill: one kill, one request to end, one kill while a checkpoint is written. The long one is a command, see kill_drill.py."""

import pytest

from tests.moma_lightning.training.kill_drill import drill


@pytest.mark.timeout(600)
def test_a_training_killed_and_restarted_ends_as_an_undisturbed_one(tmp_path):
    assert drill(tmp_path, kills=3, steps=26) == []
