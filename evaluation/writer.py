"""Pictures written by a thread while the next batch is drawn: encoding a PNG and waiting for the disk need no GPU."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from evaluation.stamps import write_picture


class BackgroundWriter:
    """Does what `stamps.write_picture` does, in order, in one thread.

    At most `waiting` pictures are held in memory: `write` then waits for the oldest. An error of the thread is raised by the next `write`
    that meets it, and by `finish` at the latest.
    """

    def __init__(self, waiting: int = 64):
        self.waiting = waiting
        self.thread = ThreadPoolExecutor(1, "picture-writer")
        self.pending: list[Future[None]] = []

    def write(self, path: Path, image: Image.Image, settings: dict[str, Any], provenance: dict[str, Any]) -> None:
        while self.pending and (self.pending[0].done() or len(self.pending) >= self.waiting):
            self.pending.pop(0).result()
        self.pending.append(self.thread.submit(write_picture, path, image, settings, provenance))

    def finish(self) -> None:
        """Wait until all that was given is on disk."""
        try:
            while self.pending:
                self.pending.pop(0).result()
        finally:
            self.pending.clear()
            self.thread.shutdown(cancel_futures=True)
