"""Tests of what a CUDA GPU alone can show: `make test ARGS=tests/moma_lightning/gpu` on a machine with one. Elsewhere they are skipped."""

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(autouse=True)
def gpu():
    """float32 without TF32's shorter mantissa; no process group, store or compiled code stays behind."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
    if dist.is_initialized():
        dist.destroy_process_group()
    torch._dynamo.reset()
