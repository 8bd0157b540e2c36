"""Both stages on one GPU: the CPU's losses, FSDP2, FSDP1 (which shards nothing on one), bfloat16, a compiled UNet, and a run that goes on where it stopped."""

import functools
import re
import subprocess
import sys

import pytest
import torch

from moma_lightning.training.ema import EMA
from moma_lightning.training.random_states import RandomStates
from moma_lightning.training.strategy import FlatShardedStrategy, ShardedStrategy
from tests.moma_lightning.training.kill_drill import drill
from tests.moma_lightning.training.sharded_run import AFTER, STEPS, build, train

HALF = STEPS // 2
STAGES = ("stage1", "stage2")
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def of_cpu(foundation, decoder_folder, tmp_path_factory):
    """Losses of 20 steps, by stage."""
    @functools.cache
    def losses(stage: str) -> list[float]:
        return train(build(stage, foundation, decoder_folder), tmp_path_factory.mktemp("cpu"), 1, "auto")

    return losses


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("strategy", ["auto", "sharded", "fsdp"])
def test_a_gpu_loses_what_the_cpu_does(foundation, decoder_folder, of_cpu, tmp_path, stage, strategy):
    losses = train(build(stage, foundation, decoder_folder), tmp_path, 1, strategy, accelerator="gpu")
    assert losses == pytest.approx(of_cpu(stage), rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("strategy", ["auto", "sharded", "fsdp"])
def test_bfloat16_loses_nearly_the_same(foundation, decoder_folder, of_cpu, tmp_path, stage, strategy):
    losses = train(build(stage, foundation, decoder_folder), tmp_path, 1, strategy, steps=3, accelerator="gpu", precision="bf16-mixed")
    assert losses == pytest.approx(of_cpu(stage)[:3], rel=0.05)


def test_a_compiled_unet_loses_the_same():
    """In processes of their own: the type checks of these tests cannot be compiled."""
    command = [sys.executable, "-m", "experiments.gpu_step", "--stage", "experiments/mini/stage2.yaml", "--steps", "5"]
    options = [["auto"], ["auto", "--compile", "true"], ["sharded", "--compile", "true"]]
    started = [subprocess.Popen([*command, "--strategy", *given], stdout=subprocess.PIPE, text=True) for given in options]
    try:
        told = [process.communicate(timeout=500)[0] for process in started]
    finally:
        for process in started:
            process.kill()  # one that is compiling does not end on SIGTERM
    assert [process.returncode for process in started] == [0, 0, 0]
    told = [re.search(r"loss ([0-9.]+) to ([0-9.]+)", text).groups() for text in told]
    plain, *compiled = [[float(loss) for loss in losses] for losses in told]
    assert compiled == [pytest.approx(plain, rel=5e-3)] * 2


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["full", "sharded", "flat"])
def test_a_checkpoint_goes_on_with_the_same_losses(foundation, decoder_folder, tmp_path, stage, kind):
    """One file, a folder of shards and FSDP1's file, with the average of the weights and the GPU's random numbers."""
    path, folder = tmp_path / f"{kind}.ckpt", kind == "sharded"

    def run(**options) -> list[float]:
        module = build(stage, foundation, decoder_folder)
        strategy = FlatShardedStrategy() if kind == "flat" else ShardedStrategy(save_distributed_checkpoint=folder)
        return train(module, tmp_path, 1, strategy, callbacks=[EMA(0.9), RandomStates()], accelerator="gpu", **options)

    whole = run(save=[path])
    assert path.is_dir() == folder
    assert run(resume=path) == pytest.approx(whole[HALF : HALF + AFTER], rel=1e-4)


def test_after_ddp_the_last_checkpoint_can_be_saved(foundation, decoder_folder, tmp_path):
    """The Trainer has put the module back onto the CPU by then, and NCCL adds up on GPUs alone."""
    module = build("stage1", foundation, decoder_folder)
    train(module, tmp_path, 1, "ddp", steps=2, accelerator="gpu")
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]["target_count"] > 0


def test_random_numbers_of_the_gpu_are_kept(foundation, decoder_folder, tmp_path):
    train(build("stage2", foundation, decoder_folder), tmp_path, 1, "auto", [tmp_path / "full.ckpt"], callbacks=[RandomStates()], accelerator="gpu")
    (state,) = torch.load(tmp_path / "full.ckpt", weights_only=True)["callbacks"]["RandomStates"]["ranks"]
    assert state["cuda"].dtype == torch.uint8


def test_a_killed_run_ends_with_the_undisturbed_ones_weights(tmp_path):
    """Bit for bit, with deterministic algorithms: a SIGKILL within a checkpoint, a SIGTERM, a SIGKILL at a random moment."""
    assert drill(tmp_path / "drill", kills=2, steps=45, gpu=True) == []
