"""Values of a GPU that are read without waiting for what it was given since."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Later:
    """A tensor on its way to the host: `read` waits for the copy alone, which is over if a step has passed meanwhile.

    (`float(tensor)` and `if tensor` would wait for all that the GPU has been given, so that it idles until it gets more.)
    """

    host: Tensor
    copied: torch.cuda.Event | None

    @classmethod
    def of(cls, tensor: Tensor) -> "Later":
        if not tensor.is_cuda:
            return cls(tensor.detach(), None)
        host, copied = tensor.detach().to("cpu", non_blocking=True), torch.cuda.Event()  # non_blocking: into pinned memory
        copied.record()
        return cls(host, copied)

    def read(self) -> Tensor:
        if self.copied is not None:
            self.copied.synchronize()
        return self.host
