"""A short drill: one kill while a checkpoint is written, one request to end. The long one is a command, see kill_drill.py."""

import pytest

from tests.moma_lightning.training.kill_drill import drill


@pytest.mark.timeout(1500)
def test_a_training_killed_and_restarted_ends_as_an_undisturbed_one(tmp_path):
    assert drill(tmp_path, kills=2, steps=16) == []
