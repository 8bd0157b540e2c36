"""Loading workers that outlive a request to end which is meant for the training process."""

import os
import signal
import threading


def ignore_requests_of_others(worker: int) -> None:
    """A DataLoader's `worker_init_fn`: SIGTERM ends this worker only where it comes from the process that it loads for.

    torchrun and SLURM send it to a training process and its workers alike. A worker that dies of it raises an error in the training process
    (PyTorch's handler there), which then ends before it has saved.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_for, args=(os.getppid(),), daemon=True).start()


def _end_for(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
