"""A request to end that reaches a whole process group: the loading workers stay until their own process lets them go."""

import subprocess
import sys
import textwrap

import pytest

#: Reads two passes of the shards on two workers; after the first batch the group gets what torchrun and SLURM send it.
READER = textwrap.dedent("""
    import os, signal, subprocess, sys, time
    from datamodules.triplets import TripletConfig, TripletDataModule

    signal.signal(signal.SIGTERM, lambda *_: print("told", flush=True))
    folder = sys.argv[1]
    config = TripletConfig(f"{folder}/train-*.tar", f"{folder}/train-*.tar", 16, 1, num_workers=2, steps_per_epoch=24)
    module = TripletDataModule(config)
    module.setup("fit")
    for number, batch in enumerate(module.train_dataloader()):
        if number == 1:
            send = "import os, signal, sys; os.killpg(int(sys.argv[1]), signal.SIGTERM)"
            subprocess.run([sys.executable, "-c", send, str(os.getpgrp())], start_new_session=True, check=True)
            time.sleep(0.5)
    print(number + 1, flush=True)
""")


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no sigwaitinfo")
def test_workers_go_on_when_the_whole_group_is_told_to_end(shards):
    done = subprocess.run([sys.executable, "-c", READER, str(shards)], capture_output=True, text=True, timeout=120, start_new_session=True, check=False)
    assert done.stdout.split() == ["told", "24"] and done.returncode == 0, done.stderr
