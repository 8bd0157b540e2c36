"""Builds on several processes, killed ones among them: Ray on this machine, a cluster by address, SIGKILL at many moments."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from datamodules.openimages.build import build
from datamodules.openimages.config import CaptionConfig, RunConfig
from tests.datamodules.openimages.conftest import command, digests, written


def test_killed_again_and_again_the_result_is_the_same(undisturbed, plain_bucket, config_of, tmp_path):
    """SIGKILL as soon as each of these appears, then an undisturbed end."""
    config = config_of(plain_bucket)
    out = Path(config.out)
    run = command(config, tmp_path / "data.yaml")
    for sign in ("work/*/tables/masks", "work/*/ordered/3.parquet", "work/*/units/00002.parquet", "work/*/samples/00001.parquet", "train-00000.tar"):
        process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 250
        while not list(out.glob(sign)) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert list(out.glob(sign))
    build(config)
    assert digests(config) == undisturbed[1]


def test_on_ray_the_same_bytes_come_out(undisturbed, plain_bucket, config_of):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'moma-lightning[openimages]'")
    config = config_of(plain_bucket, run=RunConfig(workers=2, unit=8))
    build(config)
    assert digests(config) == undisturbed[1]


def files(out: Path) -> int:
    return sum(len(names) for *_, names in os.walk(out))  # which does not mind that folders go meanwhile


@pytest.mark.timeout(900)
def test_killed_at_any_time_on_ray_the_result_is_the_same(plain_bucket, config_of, tmp_path):
    """SIGKILL of the driver when about so many of all the files are there; its workers live on for a while, beside the next run's."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'moma-lightning[openimages]'")
    config = config_of(plain_bucket, run=RunConfig(workers=2, unit=8))
    out = Path(config.out)
    build(replace(config, run=RunConfig(workers=0, unit=8)))
    whole, count = written(config), files(out)
    shutil.rmtree(out)
    run, share = command(config, tmp_path / "data.yaml"), random.uniform(0.02, 0.8)
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 250
    while files(out) < share * count and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, f"at {share} of the files"
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    assert written(config) == whole, f"killed at {share} of the files"


def test_captioners_on_ray_give_what_they_give_here(plain_bucket, config_of):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'moma-lightning[openimages]'")
    captions = CaptionConfig(captioner="tests.datamodules.openimages.plain_captioner.PlainCaptioner", init_args={"word": "picture"}, batch_size=3)
    configs = [config_of(plain_bucket, name, captions=False) for name in ("here", "on-ray")]
    configs[1].run = RunConfig(workers=2, captioners=1, unit=8)
    for config in configs:
        config.captions = captions
        assert build(config)["count"] == 40
    assert written(configs[0]) == written(configs[1])
    assert "a picture" in pd.read_parquet(f"{configs[1].out}/train-index.parquet").caption_full[0]


#: A token that a Ray of this machine has left in the home folder would be wanted by the cluster, and not be sent to an address.
WITHOUT_TOKEN = os.environ | {"RAY_AUTH_MODE": "disabled"}


@pytest.fixture
def cluster(tmp_path):
    """Address of a Ray cluster of two cores, apart from any other of this machine."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'moma-lightning[openimages]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    folder = tempfile.mkdtemp(prefix="ray")  # short: the names of sockets have a limit
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus", "2", "--port", address.partition(":")[2],
               "--node-ip-address", "127.0.0.1", "--include-dashboard", "false", "--temp-dir", folder, "--disable-usage-stats"]
    with (tmp_path / "ray.log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=WITHOUT_TOKEN)
        until = time.monotonic() + 120
        while "Ray runtime started" not in (tmp_path / "ray.log").read_text() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        yield address
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def test_on_a_cluster_the_same_bytes_come_out(undisturbed, plain_bucket, config_of, cluster, tmp_path):
    config = config_of(plain_bucket, run=RunConfig(address=cluster, unit=8))
    subprocess.run(command(config, tmp_path / "data.yaml"), check=True, stdout=subprocess.DEVNULL, env=WITHOUT_TOKEN)
    assert digests(config) == undisturbed[1]
