"""Commands of the project in processes of their own that need not import everything again: forked off a server that has, once."""

import multiprocessing
import os
import runpy
import socket
import sys
import threading
import time
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
#: What the commands that tests start spend their first seconds on.
IMPORTED = ["moma_lightning.cli", "moma_lightning.modules.stage1", "moma_lightning.modules.stage2", "moma_lightning.training.strategy",
            "datamodules.triplets", "evaluation.generation", "evaluation.shared_scoring"]


class Forked:
    """`python -m <module> <arguments>` in a session of its own, as a `subprocess.Popen` with what tests need of it.

    It works where this process does. environment: on top of this process's own. log: takes what it prints, appended.
    """

    def __init__(self, module: str, *arguments: str, log: Path, **environment: str):
        CONTEXT.set_forkserver_preload(IMPORTED)
        self._process = CONTEXT.Process(target=run, args=(module, arguments, log, Path.cwd(), dict(os.environ) | environment),
                                        daemon=True)  # a failed test's process ends with the tests
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float) -> int:
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} runs after {seconds} s")
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def run(module: str, arguments: tuple[str, ...], log: Path, folder: Path, environment: dict[str, str]) -> None:
    multiprocessing.current_process()._config["daemon"] = False  # it may start loading workers
    threading.Thread(target=end_with_the_tests, daemon=True).start()
    multiprocessing.set_start_method("fork", force=True)  # for loading workers, as in a process of its own; a forked one would hand down its own way
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def end_with_the_tests() -> None:
    multiprocessing.parent_process().join()  # also where they were killed
    os._exit(1)


def on_two_processes(module: str, *arguments: str, log: Path, seconds: float = 1200) -> None:
    """The command as torchrun would start both processes of a node. AssertionError with the log when one of them fails."""
    codes = codes_of_two(module, *arguments, log=log, seconds=seconds)
    assert codes == [0, 0], log.read_text()[-3000:]


def codes_of_two(module: str, *arguments: str, log: Path, seconds: float) -> list[int | None]:
    """What both end with; None for one that did not, within `seconds` or a minute after the other had failed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    node = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    ranks = [Forked(module, *arguments, log=log, RANK=rank, LOCAL_RANK=rank, **node) for rank in ("0", "1")]
    end = time.monotonic() + seconds
    while None in (codes := [rank.poll() for rank in ranks]) and time.monotonic() < end:
        end = min(end, time.monotonic() + 60) if any(codes) else end
        time.sleep(0.05)
    for rank in ranks:
        rank.kill()
    return codes
