"""The planner's figures against arithmetic; against two real processes in training/test_sharding.py."""

from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.fsdp._fully_shard import _fsdp_common

from moma_lightning.__main__ import main
from moma_lightning.foundation import FoundationConfig
from moma_lightning.models.image_feature_decoder import DecoderConfig, ImageFeatureDecoder
from moma_lightning.models.lora import LoraOptions
from moma_lightning.modules.stage1 import EditConfig, Stage1
from moma_lightning.modules.stage2 import Stage2, Stage2Config
from moma_lightning.optim import OptimizerConfig
from moma_lightning.plan import architectures
from moma_lightning.plan import measure as measuring
from moma_lightning.plan.measure import Measured, count_flops, count_parameters, first_chunk, measure
from moma_lightning.plan.report import Gpu, heading, memory, needed, plan
from moma_lightning.plan.stages import Experiment, read_experiment
from moma_lightning.training.options import TrainingOptions
from tests.moma_lightning.conftest import EMBED
from tests.tiny_mllms import MLLMS, SIDE, write

FULL = Path(__file__).parents[3] / "experiments/sd15_llava7b"


def experiment(
    stage: type, foundation: FoundationConfig, batch_size: int = 2, image_size: int = 32, decoder: DecoderConfig = DecoderConfig(), **training  # noqa: B008
) -> Experiment:
    options = {"foundation": asdict(foundation), "optimizer": asdict(OptimizerConfig()), "training": asdict(TrainingOptions(**training)),
               "decoder": asdict(decoder), "clip": None, "loss": "mse", "edits": asdict(EditConfig()), "stage2": asdict(Stage2Config())}
    return Experiment(stage, options, batch_size, image_size, 100, 1, False)


def test_parameters_at_the_papers_size():
    """Stage 2: subject side 2 h^2 + 1 a self-attention, context side 2 x 768 h a cross-attention, projector 1024 -> 4 x 768 with its norm."""
    widths = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280]
    by_hand = sum(2 * h * h + 1 for h in widths) + sum(2 * 768 * h for h in widths) + 1024 * 3072 + 3072 + 2 * 768
    trained, frozen = count_parameters(read_experiment(FULL / "stage2.yaml"))
    assert trained == by_hand
    # UNet 859.52 M, VAE 83.65 M, text encoder 123.06 M, LLaVA without its head 6,931 M with mapping and token
    assert frozen == pytest.approx(859.52e6 + 83.65e6 + 123.06e6 + 6_941e6, rel=0.002)


def test_parameters_of_stage_1_at_the_papers_size():
    """A Llama layer has 4 x 4096^2 + 3 x 4096 x 11008 and two norms; then the table of words, the last norm, projector, mapping, token."""
    llama = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 32064 * 4096 + 4096
    rest = (1024 * 4096 + 4096) + (4096 * 4096 + 4096) + 2 * 4096 * 1024 + 1024 * 1024 + 4096
    assert count_parameters(read_experiment(FULL / "stage1.yaml"))[0] == llama + rest


@pytest.fixture(scope="module")
def stage2_of(foundation):
    """What stage 2 takes of one of so many ranks under a policy of recomputation; each measured once."""
    return lru_cache(lambda ranks, policy: measure(experiment(Stage2, foundation, 8, 64, activation_checkpointing=policy), ranks))


def test_what_a_rank_holds_is_its_share(foundation, stage2_of):
    """In float32: 4 bytes a parameter, 4 a gradient, 8 of AdamW's moments and a 4-byte step a tensor."""
    trained, frozen = count_parameters(experiment(Stage2, foundation))
    one, two = stage2_of(1, "none"), stage2_of(2, "none")
    assert one.gradients == 4 * trained and one.parameters == pytest.approx(4 * (trained + frozen), rel=0.02)
    assert one.optimizer == pytest.approx(8 * trained, rel=0.01)
    for kind in ("parameters", "gradients", "optimizer"):
        assert getattr(two, kind) == pytest.approx(getattr(one, kind) / 2, rel=0.05), kind
    assert two.activations > 0 and two.peak > two.parameters + two.optimizer
    assert two.sent > 2 * 4 * trained


def test_sdxl_at_its_own_size():
    """204.8 M subject, 340.8 M context, 8.4 M projector; frozen: UNet 2,567.5 M, VAE 83.7 M, text 123.1 M and 694.7 M, LLaVA 6,941 M."""
    trained, frozen = count_parameters(read_experiment(FULL.parent / "sdxl_llava7b/stage2.yaml"))
    assert trained == 204_800_070 + 340_787_200 + 8_400_896
    assert frozen == pytest.approx(2567.46e6 + 83.65e6 + 123.06e6 + 694.66e6 + 6_941e6, rel=0.002)


def test_a_community_file_is_planned_by_the_configs_it_takes(foundation):
    file = replace(foundation, base="community.safetensors", base_config=foundation.base)
    assert count_parameters(experiment(Stage2, file)) == count_parameters(experiment(Stage2, foundation))


def test_recomputation_saves_activations(stage2_of):
    assert stage2_of(2, "all").activations < 0.8 * stage2_of(2, "none").activations


def test_floating_point_operations_grow_with_the_batch(foundation):
    assert count_flops(experiment(Stage2, foundation, 4)) == pytest.approx(2 * count_flops(experiment(Stage2, foundation, 2)), rel=0.01)


def test_further_noises_of_a_sample_cost_the_unet_alone(foundation):
    """Its forward and backward pass for each row; what is frozen is counted once."""
    one = experiment(Stage2, foundation, 2)
    counts = [count_flops(replace(one, model=one.model | {"stage2": one.model["stage2"] | {"noise_draws": draws}})) for draws in (1, 2, 3)]
    assert counts[2] - counts[1] == pytest.approx(counts[1] - counts[0], rel=0.01) and 0 < counts[1] - counts[0] < 0.8 * counts[0]


def test_the_heading_says_how_many_noises_a_sample_has(foundation):
    one, gpu = experiment(Stage2, foundation, 2), Gpu(80, 989, 0.25)
    assert "8 x 2 = 16 samples a step" in heading(Path("x.yaml"), one, 8, gpu)
    one.model["stage2"]["noise_draws"] = 4
    assert "8 x 2 = 16 samples x 4 noises a step" in heading(Path("x.yaml"), one, 8, gpu)


def test_the_peak_is_that_of_torchs_own_tracker(foundation, stage2_of, monkeypatch):
    """Ours leaves out the peak of each module, and nothing else."""
    ours = stage2_of(2, "all")
    monkeypatch.setattr(measuring, "PeakTracker", FSDPMemTracker)
    assert measure(experiment(Stage2, foundation, 8, 64, activation_checkpointing="all"), 2) == ours and ours.activations > 0


@pytest.mark.parametrize("family", ["idefics3", "llava_onevision"])
def test_smaller_mllms_are_planned(foundation, tmp_path, family):
    write(family, tmp_path)
    small = replace(foundation, mllm=str(tmp_path))
    planned, decoder = experiment(Stage1, small), ImageFeatureDecoder.from_foundation(small, DecoderConfig(), EMBED)
    trained = sum(p.numel() for p in decoder.parameters() if p.requires_grad)
    assert count_parameters(planned)[0] == trained
    one = measure(planned, 1)
    assert one.gradients == 4 * trained and one.activations > 0
    assert count_flops(planned) > 0


def test_adapters_are_planned(foundation):
    planned = experiment(Stage1, foundation, decoder=DecoderConfig(lora=LoraOptions(rank=2)))
    trained, _ = count_parameters(planned)
    assert measure(planned, 1).gradients == 4 * trained < count_parameters(experiment(Stage1, foundation))[0] * 4
    assert count_flops(planned) > 0


def test_a_planned_picture_is_seen_as_idefics3_sees_it():
    mllm = MLLMS["idefics3"]()[0].model.eval()
    pixels = torch.rand(2, 1, 3, SIDE, SIDE) + 0.1
    expected = mllm.get_image_features(pixels, return_dict=True).pooler_output
    torch.testing.assert_close(torch.stack(architectures.see_all(mllm, pixels, True).pooler_output), torch.stack(expected))


def test_parameters_of_stage_1_with_smolvlm():
    """SmolVLM-256M: 30 layers of 576 with 9 heads and 3 of keys; 16 patches of 768 to a token; no head."""
    layer = 2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576
    rest = 49280 * 576 + 576 + 16 * 768 * 576 + 2 * 576 * 1024 + 1024**2 + 576
    trained, frozen = count_parameters(read_experiment(FULL.parent / "sd15_smolvlm/stage1.yaml"))
    assert trained == 30 * layer + rest
    # SigLIP base at 512: 12 layers of 7.09 M, patches and places; both towers of CLIP ViT-H/14
    assert frozen == pytest.approx(12 * 7.0879e6 + 16**2 * 3 * 768 + 1024 * 768 + 632.08e6 + 354.03e6, rel=0.002)


@pytest.mark.parametrize(
    ("gigabytes", "chosen", "run"),
    [((10, 9, 8), "none", ["none"]), ((10, 9, 8), "all", ["none", "all"]), ((90, 60, 40), "none", ["none", "blocks"]),
     ((90, 85, 80), "blocks", ["none", "blocks", "all"])],
)
def test_only_policies_that_decide_are_measured(foundation, gigabytes, chosen, run):
    peaks, asked = dict(zip(("none", "blocks", "all"), gigabytes, strict=True)), []

    def measure_one(policy):
        asked.append(policy)
        return measured(peaks[policy])

    planned, gpu = experiment(Stage2, foundation, activation_checkpointing=chosen), Gpu(80, 989, 0.35)
    printed = memory(needed(measure_one, planned, gpu), gpu, planned)
    assert asked == run
    assert printed.count("not needed, not measured") == 3 - len(run)


def measured(gigabytes: float) -> Measured:
    return Measured(parameters=0, gradients=0, optimizer=0, activations=0, gathered=0, peak=int(gigabytes * 1e9), sent=0)


@pytest.mark.parametrize(("peaks", "advice"), [((10, 9, 8), "keep activation_checkpointing: none"), ((90, 60, 40), "training.activation_checkpointing: blocks"),
                                               ((90, 80, 79), "nothing here fits")])
def test_the_first_policy_that_fits_is_advised(foundation, peaks, advice):
    policies = dict(zip(("none", "blocks", "all"), map(measured, peaks), strict=True))
    assert advice in memory(policies, Gpu(80, 989, 0.35), experiment(Stage2, foundation))


def test_what_cannot_be_planned_is_told():
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing@main: no architecture at .*Known without a download: .*llava-hf/llava-1.5-7b-hf"):
        architectures.read("nobody/nothing@main", "unet")
    with pytest.raises(ValueError, match="12 GPUs in copies of 8"):
        plan(FULL / "stage2.yaml", gpus=12, shard_size=8)
    with pytest.raises(ValueError, match="cached shards cannot be planned"):
        count_parameters(replace(cached := read_experiment(FULL / "stage2.yaml"), model=cached.model | {"stage2": cached.model["stage2"] | {"cached": True}}))
    quantized = {"foundation": cached.model["foundation"] | {"mllm_quantization": "4bit"}}
    with pytest.raises(ValueError, match="mllm_quantization 4bit cannot be planned"):
        count_parameters(replace(cached, model=cached.model | quantized))
    with pytest.raises(ValueError, match="mfu 35"):
        plan(FULL / "stage2.yaml", mfu=35)


def test_the_command_reads_its_options():
    with pytest.raises(SystemExit, match="plan: 0 GPUs in copies of None"):
        main(["plan", "--stage", str(FULL / "stage2.yaml"), "--gpus", "0", "--gpu_mem", "80"])


def test_several_numbers_of_gpus_are_a_table(capsys):
    """A line each, with a rank's share of what it holds, and twice the samples for twice the GPUs."""
    main(["plan", "--stage", str(FULL.parent / "mini/stage1.yaml"), "--gpus", "[2,4]", "--gpu_mem", "80"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:5]]
    assert [row[0] for row in rows] == ["2", "4"] and all(row[5] == "none" for row in rows)
    samples = [[float(cell.replace(",", "")) for cell in row[7:9]] for row in rows]
    assert samples[1] == pytest.approx([2 * value for value in samples[0]], rel=0.01)
    with pytest.raises(SystemExit, match="3 GPUs in copies of 2"):
        main(["plan", "--stage", str(FULL.parent / "mini/stage1.yaml"), "--gpus", "[2,3]", "--shard_size", "2"])


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("shape", [(6, 4), (3, 5), (1,)])
def test_rank_0_holds_what_torch_cuts_first(ranks, shape):
    tensor = torch.arange(float(torch.tensor(shape).prod())).view(shape)
    (ours,) = first_chunk(tensor, ranks, 0)
    assert torch.equal(ours, _fsdp_common._chunk_with_empty(tensor, ranks, 0)[0])
