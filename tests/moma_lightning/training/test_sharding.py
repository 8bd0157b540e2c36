"""Sharded training on two processes against one: the same losses, and checkpoints that either reads."""

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from moma_lightning.checkpoints import load_adapter
from moma_lightning.foundation import FoundationConfig
from moma_lightning.models.image_feature_decoder import ImageFeatureDecoder
from moma_lightning.modules.stage1 import Stage1
from moma_lightning.modules.stage2 import GridConfig, Stage2
from moma_lightning.plan.measure import measure
from moma_lightning.training.ema import EMA
from moma_lightning.training.strategy import FlatShardedStrategy, ShardedStrategy
from tests.forked import codes_of_two, on_two_processes
from tests.moma_lightning.plan.test_plan import experiment
from tests.moma_lightning.training.sharded_run import (
    AFTER,
    STEPS,
    VARIANT_STEPS,
    VARIANTS,
    Norms,
    build,
    build_variant,
    scores,
    train,
)
from tests.tiny_mllms import write

HALF = STEPS // 2
pytestmark = pytest.mark.timeout(1500)  # of a machine that others use too; alone it takes one minute


@pytest.fixture(scope="module")
def places(foundation, sdxl_foundation, decoder_folder, tmp_path_factory):
    """What `sharded_run` builds its modules of."""
    folder = tmp_path_factory.mktemp("idefics3")
    write("idefics3", folder)
    return {"foundation": asdict(foundation), "sdxl": asdict(sdxl_foundation), "idefics3": asdict(replace(foundation, mllm=str(folder))),
            "decoder": decoder_folder}


@pytest.fixture(scope="module")
def runs(foundation, decoder_folder, places, tmp_path_factory):
    """Everything on one process here, then all of `sharded_run` on two. Returns (folder, losses by run)."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "foundation.json").write_text(json.dumps(places))
    losses = {}
    for stage in ("stage1", "stage2"):
        module, save, norms = build(stage, foundation, decoder_folder), [folder / stage / "full-1.ckpt"], Norms()
        losses[f"{stage}-alone"] = train(module, folder / stage, 1, "auto", save, callbacks=[EMA(0.9), norms])
        losses[f"{stage}-alone/norms"] = norms.numbers
        module, later = build(stage, foundation, decoder_folder), folder / stage / "resumed"
        train(module, later, 1, "auto", [later / "later.ckpt"], resume=save[0], callbacks=[EMA(0.9)])
    module = build("stage2", foundation, decoder_folder)
    module.grid = GridConfig(pictures=1, num_inference_steps=2)
    train(module, folder / "stage2/drawn", 1, "auto", callbacks=[EMA(0.9)], limit_val_batches=1, val_check_interval=5)
    for name in VARIANTS:
        losses[f"{name}-alone"] = train(build_variant(name, places), folder / name, 1, "auto", steps=VARIANT_STEPS)
    losses["scores-alone"] = scores(build("stage1", foundation, decoder_folder), folder / "scores", 1, "auto")
    module = build("stage2", foundation, decoder_folder)
    losses["accumulated-alone"] = train(module, folder / "alone", 1, "auto", steps=3, accumulate_grad_batches=2)
    on_two_processes("tests.moma_lightning.training.sharded_run", str(folder), log=folder / "log")
    return folder, losses | json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_two_processes_lose_what_one_does(runs, stage):
    losses = runs[1]
    assert len(losses[f"{stage}-alone"]) == STEPS and losses[f"{stage}-alone"][-1] != losses[f"{stage}-alone"][0]
    assert losses[stage] == pytest.approx(losses[f"{stage}-alone"], abs=1e-5)


@pytest.mark.parametrize("strategy", ["", "flat-"])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_logged_norm_is_of_all_ranks_gradients(runs, stage, strategy):
    norms, alone = runs[1][f"{strategy}{stage}/norms"], runs[1][f"{stage}-alone/norms"]
    assert len(norms) == STEPS and norms == pytest.approx(alone, rel=1e-2)


@pytest.mark.parametrize("strategy", ["", "flat-"])
def test_two_processes_validate_as_one_does_where_one_gives_a_batch_again(runs, strategy):
    """Nine samples, which two ranks do not share evenly: a mean over ranks of their means, or of a number rounded down, is another."""
    alone = runs[1]["scores-alone"]
    assert runs[1][f"{strategy}scores"] == pytest.approx(alone, abs=1e-5) and {"val/loss", "val/cosine", "val/r_at_1"} <= set(alone)


@pytest.mark.parametrize("name", VARIANTS)
def test_adapters_another_mllm_and_sdxl_lose_the_same_on_two(runs, name):
    losses = runs[1]
    assert len(losses[name]) == VARIANT_STEPS and losses[name] == pytest.approx(losses[f"{name}-alone"], abs=1e-5)


def test_a_compiled_unet_loses_the_same_sharded(runs):
    assert runs[1]["compiled"] == pytest.approx(runs[1]["stage2-alone"][:3], abs=1e-5)


def test_copies_of_a_node_lose_the_same(runs):
    assert runs[1]["copies"] == pytest.approx(runs[1]["stage2-alone"][:5], abs=1e-5)


@pytest.mark.parametrize("name", ["accumulated", "flat-accumulated"])
def test_accumulated_gradients_are_the_same(runs, name):
    assert len(runs[1][name]) == 6 and runs[1][name] == pytest.approx(runs[1]["accumulated-alone"], abs=1e-5)


def test_fsdp1_accumulates_each_ranks_part_alone(runs):
    accumulated, held = runs[1]["flat-parts"]
    assert accumulated == held > 1000


@pytest.mark.parametrize("name", ["stage1", "stage2", "lora"])
def test_fsdp1_loses_what_one_process_does(runs, name):
    losses, alone = runs[1][f"flat-{name}"], runs[1][f"{name}-alone"]
    assert len(losses) == len(alone) and losses == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("name", ["full-1.ckpt", "flat-2.ckpt"])
def test_fsdp1_goes_on_from_one_process_and_from_two(runs, stage, name):
    assert runs[1][f"flat-{stage}/{name}"] == pytest.approx(runs[1][f"{stage}-alone"][HALF : HALF + AFTER], abs=1e-5)


def test_fsdp1_draws_pictures_with_the_whole_adapter(runs):
    drawn = [sorted((runs[0] / "stage2" / name / "pictures").iterdir()) for name in ("flat", "drawn")]
    assert [path.name for path in drawn[0]] == [path.name for path in drawn[1]] == [f"step-{step:06d}.png" for step in (5, 10, 15, 20)]
    for two, one in zip(*drawn, strict=True):
        apart = np.abs(np.asarray(Image.open(two)).astype(int) - np.asarray(Image.open(one)))
        assert apart.max() <= 2, two.name


def test_fsdp1_goes_on_in_one_process(runs, foundation, decoder_folder, tmp_path, process_group):
    module, path = build("stage2", foundation, decoder_folder), runs[0] / "stage2/flat-2.ckpt"
    again = train(module, tmp_path, 1, FlatShardedStrategy(), resume=path, callbacks=[EMA(0.9)], limit_val_batches=1, val_check_interval=1)
    assert again == pytest.approx(runs[1]["stage2-alone"][HALF : HALF + AFTER], abs=1e-5)


def test_fsdp1_reads_as_strictly_as_one_process(runs, foundation, decoder_folder, tmp_path, process_group):
    checkpoint, name = torch.load(runs[0] / "stage2/flat-2.ckpt", weights_only=True), "adapter.image_proj.norm.weight"
    checkpoint["state_dict"][name] = checkpoint["state_dict"][name][:-1]
    torch.save(checkpoint, tmp_path / "cut.ckpt")
    with pytest.raises(ValueError, match=rf"cut\.ckpt does not fit the model:\n  {name}: shape"):
        train(build("stage2", foundation, decoder_folder), tmp_path, 1, FlatShardedStrategy(), resume=tmp_path / "cut.ckpt")


@pytest.mark.parametrize("name", ["full-1.ckpt", "flat-2.ckpt"])
def test_fsdp1_exports_the_average_that_it_resumed_with(runs, foundation, decoder_folder, name):
    module = build("stage2", foundation, decoder_folder)
    one, two = (load_adapter(runs[0] / "stage2" / run / "adapter", module.unet) for run in ("resumed", f"flat-{name}"))
    torch.testing.assert_close(dict(two.named_parameters()), dict(one.named_parameters()), atol=1e-4, rtol=1e-4)


def test_fsdp1_gathers_blocks_in_bf16_and_the_rest_in_float32(runs):
    assert runs[1]["flat-dtypes"] == ["torch.bfloat16", "torch.float32", "torch.float32"]
    assert runs[1]["flat-bf16"] == pytest.approx(runs[1]["stage1-alone"][:3], rel=0.05)


def test_fsdp1_shards_a_stage_once(foundation, decoder_folder, tmp_path, process_group):
    module = build("stage2", foundation, decoder_folder)
    train(module, tmp_path, 1, FlatShardedStrategy(), steps=1)
    with pytest.raises(ValueError, match="sharded already, by an earlier call of the Trainer; build it anew"):
        train(module, tmp_path, 1, FlatShardedStrategy(), steps=1)


@pytest.mark.parametrize(("one", "two"), [
    ("full-1.ckpt", "full-2.ckpt"), ("full-1.ckpt", "flat-2.ckpt"), ("resumed/later.ckpt", "flat-full-1.ckpt/later.ckpt"),
    ("resumed/later.ckpt", "flat-flat-2.ckpt/later.ckpt"),
])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_one_file_holds_the_same_whichever_wrote_it(runs, stage, one, two):
    """Trained weights, their average, the sums of stage 1's targets and the optimizer's state, by the same names and numbers, also after a resume."""
    one, two = (torch.load(runs[0] / stage / path, weights_only=True) for path in (one, two))
    for part in ("state_dict", "ema"):
        torch.testing.assert_close(two[part], one[part], atol=5e-5, rtol=1e-5)
    states = [c["optimizer_states"][0]["state"] for c in (one, two)]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 10
    for key, atol, rtol in (("exp_avg", 1e-5, 1e-4), ("exp_avg_sq", 1e-8, 1e-3), ("step", 0.0, 0.0)):
        expected, found = ({i: entry[key] for i, entry in state.items()} for state in states)
        torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)
    assert len({entry["step"].data_ptr() for entry in states[1].values()}) == len(states[1])  # shared, all would advance with each


def test_checkpoints_hold_the_random_states_of_both_processes(runs):
    states = torch.load(runs[0] / "stage2/full-2.ckpt", weights_only=True)["callbacks"]["RandomStates"]["ranks"]
    assert len(states) == 2 and all(state["torch"].dtype == torch.uint8 for state in states)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_each_process_draws_noise_of_its_own(runs, stage):
    one, two = runs[1][f"{stage}/drawn"]
    assert all(a != b for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("run", ["two", "flat"])
def test_the_exported_adapter_is_whole(runs, foundation, decoder_folder, run):
    module = build("stage2", foundation, decoder_folder)
    loaded = load_adapter(runs[0] / "stage2" / run / "adapter", module.unet)
    average = load_adapter(runs[0] / "stage2/adapter", module.unet)
    # Adam divides by the roots of gradients near zero, so a step's rounding may be a part of lr (1e-3); a shard that is away differs by more.
    torch.testing.assert_close(dict(loaded.named_parameters()), dict(average.named_parameters()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("run", ["two", "flat"])
def test_the_exported_decoder_is_whole(runs, foundation, run):
    one, two = (dict(ImageFeatureDecoder.from_pretrained(folder / "image_feature_decoder", foundation).own_parameters())
                for folder in (runs[0] / "stage1", runs[0] / "stage1" / run))
    torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-4)


def test_bf16_is_for_the_frozen_units_and_lambda_stays_in_float32(runs):
    assert runs[1]["dtypes"] == {"unet": "torch.bfloat16", "lambda": "torch.float32", "kept": "torch.float32"}
    assert runs[1]["bf16"] == pytest.approx(runs[1]["stage2-alone"][:2], rel=0.05)
    assert [path.name for path in (runs[0] / "bf16/pictures").iterdir()] == ["step-000002.png"]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("name", ["full-1.ckpt", "sharded-2.ckpt"])
def test_two_processes_go_on_from_every_kind_of_checkpoint(runs, stage, name):
    losses = runs[1]
    assert losses[f"{stage}/{name}"] == pytest.approx(losses[f"{stage}-alone"][HALF : HALF + AFTER], abs=1e-5)


@pytest.mark.parametrize("name", ["full-2.ckpt", "flat-2.ckpt"])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_one_process_goes_on_from_two_processes(runs, foundation, decoder_folder, stage, name):
    folder, losses = runs
    again = train(build(stage, foundation, decoder_folder), folder / "one", 1, "auto", resume=folder / stage / name)
    assert again == pytest.approx(losses[f"{stage}-alone"][HALF : HALF + AFTER], abs=1e-5)


@pytest.fixture
def process_group():
    """Leaves no process group behind in the test process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_one_sharded_process_reads_the_shards_of_two(runs, foundation, decoder_folder, stage, process_group):
    folder, losses = runs
    again = train(build(stage, foundation, decoder_folder), folder / "one", 1, ShardedStrategy(), resume=folder / stage / "sharded-2.ckpt")
    assert again == pytest.approx(losses[f"{stage}-alone"][HALF : HALF + AFTER], abs=1e-5)


def folder_copy(runs, tmp_path):
    return shutil.copytree(runs[0] / "stage2/sharded-2.ckpt", tmp_path / "copy.ckpt")


@pytest.mark.parametrize("lost", ["meta.pt", ".metadata", "__1_0.distcp"])
def test_a_folder_that_lacks_a_file_is_refused_by_name(runs, foundation, decoder_folder, tmp_path, process_group, lost):
    (folder_copy(runs, tmp_path) / lost).unlink()
    with pytest.raises(ValueError, match=r"copy\.ckpt is not a whole checkpoint"):
        train(build("stage2", foundation, decoder_folder), tmp_path, 1, ShardedStrategy(), resume=tmp_path / "copy.ckpt")


def test_a_folder_is_read_as_strictly_as_a_file(runs, foundation, decoder_folder, tmp_path, process_group):
    module = build("stage2", foundation, decoder_folder)
    module.adapter.image_proj.norm.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"copy\.ckpt does not fit the model:\n  adapter\.image_proj\.norm\.weight: not expected"):
        train(module, tmp_path, 1, ShardedStrategy(), resume=folder_copy(runs, tmp_path))


def test_no_number_on_one_rank_ends_both_and_saves_nothing(places, tmp_path):
    """On rank 1, at the very step of a checkpoint; the message names the samples of its batch, and rank 0 does not wait for it for ever."""
    (tmp_path / "foundation.json").write_text(json.dumps(places))
    log = tmp_path / "log"
    codes = codes_of_two("tests.moma_lightning.training.sharded_run", str(tmp_path), "spoilt", log=log, seconds=250)
    assert all(codes), f"{codes}: {log.read_text()[-3000:]}"
    last = STEPS // 2 - 1
    assert f"the loss is nan after step {last + 1} on rank 1. Samples of the batch: {last}-2, {last}-3. Nothing was saved since" in log.read_text()
    assert not (tmp_path / "spoilt.ckpt").exists()


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_planner_foretells_what_two_processes_hold(runs, foundation, stage):
    planned = measure(experiment({"stage1": Stage1, "stage2": Stage2}[stage], foundation), 2)
    for kind, held in runs[1][f"{stage}/held"].items():
        assert getattr(planned, kind) == pytest.approx(held, rel=0.05), kind


@pytest.mark.parametrize("name", VARIANTS)
def test_the_planner_foretells_adapters_another_mllm_and_sdxl(runs, places, name):
    stage, foundation, decoder = VARIANTS[name]
    planned = measure(experiment({"stage1": Stage1, "stage2": Stage2}[stage], FoundationConfig(**places[foundation]), decoder=decoder), 2)
    held = runs[1][f"{name}/held"]
    assert held.keys() == {"parameters", "gradients", "optimizer"}
    for kind in held:
        assert getattr(planned, kind) == pytest.approx(held[kind], rel=0.05), kind
