"""A short drill: a kill while a checkpoint is written, a request to end, a kill at a random moment. The long ones are commands, see kill_drill.py."""

import pytest

from tests.moma_lightning.training.kill_drill import drill


@pytest.mark.timeout(1500)
def test_a_training_killed_and_restarted_ends_as_an_undisturbed_one(tmp_path):
    assert drill(tmp_path, kills=2, steps=18) == []
