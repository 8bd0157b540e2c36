"""For every test file."""

import os

import pytest


@pytest.fixture(autouse=True, scope="module")
def environment():
    """What a file leaves in the environment, the next one does not find: a sharded training in this process sets the port of a store that lives on."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
