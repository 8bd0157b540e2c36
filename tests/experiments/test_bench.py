"""The bench compares like with like, and writes what it says. Nothing here is timed."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaModel

from experiments import bench
from experiments.benchmarks import explicit, guided_step, loading, timing, training_step, whole_subject
from experiments.benchmarks.discs import disc
from experiments.benchmarks.guided_step import Setting, Size
from moma_lightning.models.mask_estimation import estimate_mask
from moma_lightning.plan import architectures
from moma_lightning.plan.stages import read_experiment
from moma_lightning.segmentation import SamConfig, build_sam
from tests.tiny import tiny_unet


@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
def test_the_explicit_baseline_computes_the_same_step(share):
    """The whole UNet with explicit matrices, to fp32 rounding, and M_gen of its label maps."""
    torch.manual_seed(0)
    setting = Setting(tiny_unet().eval(), 8, share, torch.device("cpu"))
    first, noise = setting.moma(), setting.moma()  # the bench times the second, which finds keys made
    estimated, explicit = setting.guide.generated_mask, setting.explicit()
    assert torch.equal(first, noise)
    torch.testing.assert_close(noise, explicit(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(estimated, estimate_mask(setting.given.maps, (8, 8)), atol=1e-3, rtol=1e-3)
    assert estimated.any() and not torch.allclose(noise, setting.plain()(), atol=1e-3)


def test_in_the_released_codes_shape_every_matrix_is_written_and_nothing_is_kept(monkeypatch):
    setting = Setting(tiny_unet().eval(), 8, 0.25, torch.device("cpu"))
    plain, estimated, asked = setting.moma(), setting.guide.generated_mask, []
    monkeypatch.setattr(explicit, "probabilities", lambda *given, whole=explicit.probabilities: asked.append(given) or whole(*given))
    setting.made = {}
    with explicit.written_out():
        written = setting.moma()
    layers = len(setting.unet.attn_processors)
    assert len(asked) == 2 * layers, "text and image tokens, self and subject"
    assert "text" not in {name for _, name in setting.made}
    torch.testing.assert_close(written, plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(setting.guide.generated_mask, estimated, atol=1e-3, rtol=1e-3)
    asked.clear()
    setting.moma()
    assert not asked and setting.made, "it ends with the baseline"


def test_the_plain_side_is_the_same_unet_with_other_attention():
    setting = Setting(tiny_unet().eval(), 8, 0.25, torch.device("cpu"))
    plain = setting.plain()()
    assert torch.equal(plain, setting.unet(setting.latents, 500, setting.text).sample)


def test_disc_has_the_share_asked_for():
    assert [disc(share, 8).mean().item() for share in (0.25, 0.5, 1.0)] == [0.25, 0.5, 1.0]


def test_pairs_alternate_and_the_ratio_is_the_pairs_median(monkeypatch):
    order, taken = [], iter([3.0, 1.0, 1.0, 2.0, 10.0, 2.0])
    monkeypatch.setattr(timing, "seconds", lambda run, device, by_the_clock: run() or next(taken))
    a, b = (lambda: order.append("a")), (lambda: order.append("b"))
    entry = timing.alternate(a, b, 3, torch.device("cpu"))
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert (entry["ratio"], entry["lo"], entry["hi"]) == (3.0, 2.5, 4.0)
    assert (entry["a"], entry["b"]) == (3.0, 1.0)


def test_garbage_is_collected_before_each_run_and_not_in_its_time(monkeypatch):
    """After it the processor's caches are cold: the first of two would look slower."""
    told, clock = [], iter([1.0, 3.0])
    monkeypatch.setattr(timing.gc, "collect", lambda: told.append("collected"))
    monkeypatch.setattr(timing.time, "process_time", lambda: told.append("clock") or next(clock))
    assert timing.seconds(lambda: told.append("run"), torch.device("cpu")) == 2.0
    assert told == ["collected", "clock", "run", "clock"]


def test_peak_memory_is_of_the_run_alone():
    big, small = (timing.peak_mb(lambda n=n: torch.ones(n, 2**18).sum(), torch.device("cpu")) for n in (64, 1))
    if big is None or small is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert 40 < big - small < 90, "64 MiB more"


@pytest.mark.parametrize("goal, expected", [("<= 1.05", False), ("<= 1.2", True), (">= 1.0", True), (">= 4", False), ("", None)])
def test_reached(goal, expected):
    assert timing.reached({"goal": goal, "ratio": 1.1}) is expected


def test_it_writes_bench_json_and_keeps_other_entries(tmp_path, monkeypatch, capsys):
    out = tmp_path / "bench.json"
    out.write_text(json.dumps({"another": {"ratio": 1}}))
    case = timing.Case("this / that", "<= 9", "tiny", lambda device: (lambda: None, lambda: None))
    monkeypatch.setattr(bench, "all_cases", lambda full, compiled: [case, timing.Case("not asked for", "", "", lambda device: 1 / 0)])
    monkeypatch.setattr(timing, "seconds", lambda run, device, by_the_clock: 2.0)
    bench.main(["--only", "this", "--pairs", "3", "--device", "cpu", "--out", str(out)])
    entries = json.loads(out.read_text())
    assert set(entries) == {"another", "this / that"}
    assert set(entries["this / that"]) == {"ratio", "lo", "hi", "goal", "a", "b", "a_mb", "b_mb", "shape"}
    assert "this / that" in capsys.readouterr().out


@pytest.mark.parametrize("shards, workers", [(1, 0), (4, 0), (4, 2)])
def test_a_loaders_epoch_reads_as_many_samples_from_any_number_of_shards(monkeypatch, shards, workers):
    monkeypatch.setattr(loading, "BATCH", 4)
    monkeypatch.setattr(loading, "SAMPLES", 8)
    epoch = loading.Epoch(shards, workers, side=32, source=(64, 48), times=2)
    keys = [sorted(key for batch in epoch.loader for key in batch.key) for _ in range(2)]
    assert keys[0] == keys[1] == [f"{i:04d}" for i in range(16)]
    assert next(iter(epoch.loader)).pixel_values.shape == (4, 3, 32, 32)


def test_what_other_processes_do_is_timed_by_the_clock(monkeypatch):
    monkeypatch.setattr(timing.time, "process_time", lambda: 0.0)
    assert timing.seconds(lambda: time.sleep(0.01), torch.device("cpu")) == 0
    assert timing.seconds(lambda: time.sleep(0.01), torch.device("cpu"), by_the_clock=True) >= 0.01


def test_every_case_has_a_name_of_its_own():
    names = [case.name for case in bench.all_cases(full=True, compiled=True)]
    assert len(set(names)) == len(names)
    fewer = [{case.name for case in bench.all_cases(full, compiled)} for full, compiled in ((False, False), (True, False), (False, True))]
    assert fewer[0] == fewer[1] & fewer[2] and fewer[1] | fewer[2] == set(names)


def test_stage_2_is_held_against_one_goal_wherever_the_ip_adapter_does_as_the_published_one():
    """docs/performance.md's verdicts are the bench's; an IP-Adapter that shares its noises too has no goal."""
    goals = {case.name: case.goal for case in training_step.cases(full=True) if "/ IP-Adapter step" in case.name}
    assert {goal for name, goal in goals.items() if "of as many" not in name} == {"<= 1.35"} and len(goals) == 12


def test_both_sides_of_a_compiled_case_are_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, mode: compiled.append((module, mode)))
    monkeypatch.setattr(Size, "build", lambda size, device: tiny_unet().eval())
    cases = guided_step.cases([Size("tiny", 8, 1.0, compiled=True)])
    assert not [case for case in cases if "explicit" in case.name], "which is not compiled"
    for run in cases[0].prepare(torch.device("cpu")):
        run()
    (ours, mode), (plain, same) = compiled
    assert ours is not plain and mode == same == guided_step.COMPILE


def test_training_steps_compare_the_same_training():
    """From a cache the loss is the online one for the same draws; every trained parameter moves."""
    module, batch = training_step.stage2(torch.device("cpu")), training_step.batch_of(2, torch.device("cpu"))
    losses = []
    for given in (batch, training_step.cached(module, batch)):
        torch.manual_seed(0)
        losses.append(module.sample_losses(given, drop=True)[0].mean())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    before = [parameter.clone() for parameter in training_step.trained(module.adapter)]
    training_step.stage2_step(module, batch)()
    assert all(not torch.equal(a, b) for a, b in zip(before, training_step.trained(module.adapter), strict=True))


def test_the_bare_mllm_reads_what_stage_1_reads(monkeypatch):
    """The same picture and words come to the language model; stage 1 has its learnable token after them."""
    read, forward = [], LlamaModel.forward
    monkeypatch.setattr(LlamaModel, "forward", lambda *args, **given: read.append(given["inputs_embeds"].detach()) or forward(*args, **given))
    monkeypatch.setattr(training_step, "step", lambda parameters, loss: loss)
    ours, bare = training_step.stage1_against_bare_mllm(torch.device("cpu"))
    bare(), ours()
    without, with_token = read
    assert with_token.shape[1] == without.shape[1] + 1
    same = (with_token[:, :-1] - without).abs().amax(-1) < 1e-5
    assert same.sum(1).min() >= same.shape[1] - 1, "in a padded row the token stands in the first padding's place"


def test_both_loaders_give_all_samples(monkeypatch):
    """Each counts its own."""
    monkeypatch.setattr(loading, "SAMPLES", 4)
    monkeypatch.setattr(loading, "BATCH", 2)
    bare, ours = loading.bare_against_ours(torch.device("cpu"))
    bare(), ours()


@pytest.fixture
def small(monkeypatch):
    """The mini world's shapes where the bench has the paper's, two pictures at once, on the CPU."""
    monkeypatch.setattr(training_step, "read_experiment", lambda path: replace(read_experiment(path), batch_size=2))
    for part in (training_step, whole_subject):
        monkeypatch.setattr(part, "SD15", Path("experiments/mini"))
    monkeypatch.setattr(whole_subject, "sam_model_registry", {"vit_h": lambda: build_sam(SamConfig())})
    monkeypatch.setattr(whole_subject, "TRUE_SETTING", whole_subject.Setting(whole_subject.FEW_PROMPTS, 2, 1, 2, 3.0))
    return torch.device("cpu")


@pytest.mark.parametrize(("case", "options"), [
    ("true_against_ip_adapter", {}), ("true_subject_side", {}), ("true_subject_side", {"from_cache": True}),
    ("true_subject_side", {"from_cache": True, "reference": True}), ("true_online_against_cached", {}), ("true_stage1_against_bare_mllm", {})])
def test_steps_of_an_experiments_own_size_run(small, case, options):
    for run in getattr(training_step, case)(small, **options):
        run()


def test_stage_1_runs_with_a_few_layers(small):
    for run in training_step.true_stage1_against_bare_mllm(small, layers=1):
        run()


def test_a_language_model_can_be_shortened():
    experiment = read_experiment(Path("experiments/sd15_llava7b/stage1.yaml"))
    with training_step.shortened(experiment, 3) as short, torch.device("meta"):
        mllm = architectures.build_mllm(short.model["foundation"]["mllm"])
    assert len(mllm.model.language_model.layers) == 3 and mllm.config.text_config.hidden_size == 4096
    assert experiment.model["foundation"]["mllm"] != short.model["foundation"]["mllm"]


def test_random_models_train(small):
    """Every trained parameter gets a finite gradient, most of them one other than 0."""
    module, batch = training_step.true_stage2(small)
    module.sample_losses(batch, drop=True)[0].mean().backward()
    grads = [parameter.grad for parameter in training_step.trained(module)]
    assert all(torch.isfinite(grad).all() for grad in grads) and sum(bool(grad.any()) for grad in grads) > 0.9 * len(grads)


@pytest.mark.parametrize("released", [True, False])
def test_a_subject_at_once_draws_the_pictures_of_one_by_one(small, released):
    torch.manual_seed(0)
    one, both = (run() for run in whole_subject.against_batched(whole_subject.true_evaluation, released)(small))
    assert one.shape == both.shape == (4, 64, 64, 3)
    assert abs(one - both).max() < 1e-4  # other prompts differ by .005


def test_in_16_bits_a_subject_at_once_draws_nearly_the_pictures_of_the_loop():
    setting = whole_subject.Setting(whole_subject.FEW_PROMPTS[:2], 2, 1, 2, 3.0)
    loop, at_once = (run() for run in whole_subject.against_16_bits(torch.device("cpu"), setting))
    assert loop.shape == at_once.shape == (2, 64, 64, 3)
    assert 0 < abs(loop - at_once).mean() < 0.01 < abs(loop[0] - loop[1]).mean()


def test_on_two_cores_each_way_draws_two_subjects(monkeypatch):
    setting, drawn = whole_subject.Setting(whole_subject.FEW_PROMPTS[:2], 1, 1, 2, 3.0), []
    as_released, at_once = whole_subject.on_two_cores(torch.device("cpu"), setting)
    monkeypatch.setattr(whole_subject.Evaluation, "as_released", lambda self: drawn.append((self.tasks, torch.get_num_threads())))
    before = torch.get_num_threads()
    as_released()
    assert drawn == [([(prompt, 0) for prompt in setting.prompts], 2)] * 2 and torch.get_num_threads() == before
    assert at_once() == [2, 2]


def test_a_name_that_no_case_has_is_an_error_that_lists_them(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--only", "no such case"])
    assert "guided step / plain, mini, mask 25%" in capsys.readouterr().err
