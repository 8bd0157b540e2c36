import csv
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from torch.utils.data import DataLoader

from moma_lightning import losses
from moma_lightning.batch import TripletBatch
from moma_lightning.checkpoints import load_adapter, save_adapter
from moma_lightning.digests import identity
from moma_lightning.modules.stage2 import GridConfig, Stage2, Stage2Config
from moma_lightning.modules.stage2_parts import build_adapter
from moma_lightning.optim import OptimizerConfig
from moma_lightning.training.ema import EMA

EMBED = 12


def batch(seed: int, size: int = 3, height: int = 32, width: int = 32, empty: bool = False) -> TripletBatch:
    rng = torch.Generator().manual_seed(seed)
    mask = (torch.rand(size, 1, height, width, generator=rng) > 0.5).float()
    mask[1:, :, : height // 2] = 0
    if empty:
        mask[0] = 0
    pixels = torch.rand(size, 3, height, width, generator=rng) * 2 - 1
    return TripletBatch(pixels, mask, ["a cat on a lake"] * size, ["cat"] * size, [f"{seed}-{i}" for i in range(size)])


def loader(*seeds: int) -> DataLoader:
    return DataLoader([batch(seed) for seed in seeds], batch_size=None)


def trainer(folder, steps: int, **options) -> Trainer:
    return Trainer(max_steps=steps, default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False,
                   enable_model_summary=False, num_sanity_val_steps=0, **{"enable_checkpointing": False, **options})


def test_the_decoder_that_it_was_trained_with_is_known(build_stage2, decoder_folder):
    """By its digest, which a finished run keeps, from a cache too."""
    digests = [build_stage2(**options).decoder_digest for options in ({}, {"cached": True}, {"context": "image_encoder"})]
    assert digests == [identity(decoder_folder)] * 2 + [None]


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_training_moves_the_adapter_and_nothing_else(build_stage2, tmp_path, variant):
    module = build_stage2(variant=variant)
    before = {n: v.clone() for n, v in module.state_dict().items()}
    trainer(tmp_path, 3).fit(module, loader(0, 1, 2))
    changed = {n for n, v in module.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {n for n, _ in module.adapter.named_parameters(prefix="adapter")}
    assert all(layer.lambda_ != 0 for layer in module.adapter.subject.values())


def test_parameter_counts_of_the_paper_layout(build_stage2):
    module = build_stage2()
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    by_hand = sum(2 * c * c + 1 for c in (16, 16, 16, 32, 32, 32, 32)) + sum(2 * c * 32 for c in (16, 16, 16, 32, 32, 32, 32))
    by_hand += (EMBED * 4 * 32 + 4 * 32) + 2 * 32
    assert trained == by_hand


def test_an_ip_adapter_has_no_subject_side(build_stage2, tmp_path):
    module = build_stage2(context="image_encoder", subject=False)
    trainer(tmp_path, 2).fit(module, loader(0, 1))
    assert not any(p.requires_grad for p in module.adapter.subject.parameters())
    loaded = load_adapter(tmp_path / "adapter", module.unet)
    torch.testing.assert_close(loaded.image_proj.proj.weight, module.adapter.image_proj.proj.weight)


@pytest.mark.parametrize("shape", [(32, 32), (32, 64), (40, 24)])
def test_sizes_and_empty_masks_stay_finite(build_stage2, shape):
    module = build_stage2()
    values, _ = module.sample_losses(batch(0, height=shape[0], width=shape[1], empty=True), drop=True)
    values.mean().backward()
    assert torch.isfinite(values).all()
    assert all(torch.isfinite(p.grad).all() for p in module.adapter.parameters())


def test_a_sample_does_not_see_its_neighbours(build_stage2):
    """With mixed masks in one batch each sample's prediction equals the one it gets alone."""
    module = build_stage2().eval()
    with torch.no_grad():
        for layer in module.adapter.subject.values():
            layer.lambda_.fill_(0.8)
        whole = batch(0)
        noisy, timesteps, embeds = torch.randn(3, 4, 4, 4), torch.tensor([10, 500, 900]), torch.randn(3, EMBED)
        clean = module.vae.encode(whole.pixel_values).latent_dist.mode()
        together = module(noisy, timesteps, whole, embeds, whole.caption, clean)
        for i in range(3):
            one = TripletBatch(whole.pixel_values[i : i + 1], whole.subject_mask[i : i + 1], whole.caption[:1], whole.label[:1], whole.key[:1])
            alone = module(noisy[i : i + 1], timesteps[i : i + 1], one, embeds[i : i + 1], one.caption, clean[i : i + 1])[0]
            torch.testing.assert_close(alone, together[i], atol=1e-4, rtol=1e-4)


def test_the_loss_can_weigh_the_subject_and_the_timesteps(build_stage2):
    module, one = build_stage2(subject_weight=3.0, min_snr_gamma=5.0), batch(0)
    module.forward = lambda noisy_latents, *rest: torch.zeros_like(noisy_latents)
    values, timesteps = module.sample_losses(one, torch.Generator().manual_seed(4), drop=False)
    generator = torch.Generator().manual_seed(4)
    _, _, noise = (torch.randn(3, 4, 4, 4, generator=generator) for _ in range(3))  # two samples of the posterior come first
    for i, t in enumerate(timesteps.tolist()):
        weight = 1 + 3 * one.subject_mask[i, 0].reshape(4, 8, 4, 8).mean((1, 3))
        snr = module.noise_scheduler.alphas_cumprod[t] / (1 - module.noise_scheduler.alphas_cumprod[t])
        expected = (noise[i] ** 2 * weight / weight.mean()).mean() * min(snr, torch.tensor(5.0)) / snr
        torch.testing.assert_close(values[i], expected)


def test_validation_draws_the_same_for_the_same_seed(build_stage2):
    """Whatever the state of the global generator: equal weights have an equal validation loss."""
    module, losses_ = build_stage2(), []
    for state in (1, 2):
        torch.manual_seed(state)
        losses_.append(module.sample_losses(batch(0), torch.Generator().manual_seed(4), drop=False)[0])
    assert torch.equal(*losses_)


def test_the_reference_pass_and_the_target_are_two_samples_of_one_posterior(build_stage2):
    module, one = build_stage2(), batch(0)
    posterior = module.vae.encode(one.pixel_values).latent_dist
    torch.manual_seed(1)
    target, seen = module.latents(one)
    torch.manual_seed(1)
    expected = [posterior.sample() * module.vae.config.scaling_factor for _ in range(2)]
    torch.testing.assert_close([target, seen], expected)
    white = build_stage2(variant="paper").latents(one)[1]
    assert not torch.allclose(white, seen, atol=0.5)


def test_dropout_is_zeros_before_the_projector_and_never_the_subject(build_stage2):
    module = build_stage2(context_dropout=1.0)
    seen = {}
    module.adapter.image_proj.register_forward_pre_hook(lambda _, args: seen.__setitem__("embeds", args[0]))
    subject = module.adapter.subject_conditioning
    module.adapter.subject_conditioning = lambda *args, **kw: seen.__setitem__("subject", True) or subject(*args, **kw)
    module.sample_losses(batch(0), drop=True)
    assert (seen["embeds"] == 0).all() and seen["subject"]
    module.sample_losses(batch(0), drop=False)
    assert (seen["embeds"] != 0).any()


def test_noise_prediction_loss_is_equation_1():
    a, b = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    expected = torch.stack([((a[i] - b[i]) ** 2).sum() / 36 for i in range(2)])
    torch.testing.assert_close(losses.noise_prediction_losses(a, b), expected)


def test_logged_lambda_is_that_of_the_logged_step(build_stage2, tmp_path):
    """Lightning writes every n-th step with what was logged last, which must not be of a step before."""
    module = build_stage2()
    seen = []
    module.on_before_zero_grad = lambda _: seen.append(next(iter(module.adapter.subject.values())).lambda_.item())  # as each step begins
    logger = CSVLogger(tmp_path, name="", version="")
    run = Trainer(max_steps=4, default_root_dir=tmp_path, accelerator="cpu", logger=logger, log_every_n_steps=2, enable_progress_bar=False,
                  enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0, limit_val_batches=0)
    run.fit(module, loader(0, 1, 2, 3))
    rows = {int(row["step"]): row for row in csv.DictReader((tmp_path / "metrics.csv").open())}
    name = f"lambda/{next(iter(module.adapter.subject))}"
    assert sorted(rows) == [1, 3] and [float(rows[step][name]) for step in (1, 3)] == pytest.approx([seen[1], seen[3]])


@pytest.mark.parametrize("clipping", [{"gradient_clip_val": 0.05}, {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}, {}])
def test_the_norm_of_the_gradients_before_they_are_clipped_by_it_is_logged(build_stage2, tmp_path, clipping):
    module, before, after = build_stage2(), [], []

    def norm() -> float:
        return sum(p.grad.double().square().sum().item() for p in module.parameters() if p.grad is not None) ** 0.5

    module.on_before_optimizer_step = lambda _: before.append(norm())
    module.on_train_batch_end = lambda *_: after.append(norm())
    run = trainer(tmp_path, 1, **clipping)
    run.fit(module, loader(0))
    logged = {"train/grad_norm": pytest.approx(before[0])} if clipping.keys() == {"gradient_clip_val"} else {}
    assert {name: float(value) for name, value in run.callback_metrics.items() if "norm" in name} == logged
    assert before[0] > 0.06 and (after[0] == pytest.approx(0.05, rel=1e-4)) == bool(logged)


def test_a_quarter_of_the_schedule_without_a_sample_is_logged_as_nan(build_stage2, tmp_path):
    """And not as what it was the last time."""
    module, drawn = build_stage2(), iter([[0, 300, 999], [100, 100, 600]])
    module.random_draws = lambda latents, generator, drop, draws: (torch.zeros_like(latents), torch.tensor(next(drawn)), None)
    logger = CSVLogger(tmp_path, name="", version="")
    fitted = Trainer(max_steps=2, default_root_dir=tmp_path, accelerator="cpu", logger=logger, log_every_n_steps=1, enable_progress_bar=False,
                     enable_model_summary=False, enable_checkpointing=False)
    fitted.fit(module, loader(0, 1))
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [[row[f"train/loss_t{band}"] == "nan" for band in range(4)] for row in rows] == [[False, False, True, False], [False, True, False, True]]


def test_a_caption_that_cannot_be_redrawn_does_not_end_training(build_stage2, tmp_path):
    module = build_stage2()
    module.grid = GridConfig(pictures=2, num_inference_steps=2)
    odd, none = (replace(batch(5), caption=captions) for captions in (["a lake without it", "a cat on a lake", "a cat"], ["a lake"] * 3))
    with pytest.warns(UserWarning, match="5-0 is not redrawn: .*'cat' does not occur"):
        trainer(tmp_path, 1).fit(module, loader(0), DataLoader([none], batch_size=None))
    assert not (tmp_path / "pictures").exists()
    with pytest.warns(UserWarning, match="5-0 is not redrawn: .*'cat' does not occur"):
        trainer(tmp_path, 1).fit(module, loader(0), DataLoader([odd], batch_size=None))
    assert Image.open(next((tmp_path / "pictures").iterdir())).height < 2 * 40


def test_an_average_that_is_left_out_is_told_of(build_stage2, tmp_path):
    first = trainer(tmp_path, 1, callbacks=[EMA(0.5)])
    first.fit(build_stage2(), loader(0))
    first.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match=r"last.ckpt holds an average of the weights \(EMA\), which is left out"):
        trainer(tmp_path, 2).fit(build_stage2(), loader(1), ckpt_path=tmp_path / "last.ckpt")


def test_the_picture_grid_of_validation_is_written(build_stage2, tmp_path):
    module = build_stage2()
    module.grid = GridConfig(pictures=2, num_inference_steps=2)
    trainer(tmp_path, 1, limit_val_batches=1).fit(module, loader(0), loader(1))
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["step-000001.png"]
    trainer(tmp_path, 1, limit_val_batches=1).validate(module, loader(1))
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["step-000001.png"], "a validation by itself is not part of the run"


def test_the_grids_samples_come_to_each_rank_by_way_of_the_cpu(build_stage2, monkeypatch):
    """Pickled tensors of a GPU are unpickled on the GPU that they were on, rank 0's."""
    module, told = build_stage2(), []
    module.grid, module.grid_samples, module._device_mesh = GridConfig(pictures=1), batch(1), object()
    monkeypatch.setattr(module, "transfer_batch_to_device", lambda samples, device, _: told.append(f"to {device}") or samples)
    monkeypatch.setattr(module, "_log_grid", lambda samples: told.append("drawn"))
    monkeypatch.setattr(type(module), "device", torch.device("cuda:3"))
    strategy = SimpleNamespace(broadcast=lambda samples: told.append("broadcast") or samples)
    module._trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.FITTING), sanity_checking=False, strategy=strategy,
                                      precision_plugin=SimpleNamespace(forward_context=nullcontext))
    module.on_validation_epoch_end()
    assert told == ["to cpu", "broadcast", "to cuda:3", "drawn"]


def test_with_bf16_the_frozen_units_are_held_in_it(build_stage2, tmp_path):
    """The loss is near that of float32, the adapter stays in it, and validation draws its pictures."""
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        module = build_stage2()
        module.grid = GridConfig(pictures=1, num_inference_steps=2)
        for layer in module.adapter.subject.values():
            torch.nn.init.constant_(layer.lambda_, 0.5)
        module.on_train_batch_end = lambda outputs, *_: losses.append(outputs["loss"].item())
        torch.manual_seed(0)
        trainer(tmp_path / precision, 1, precision=precision, limit_val_batches=1).fit(module, loader(0), loader(1))
        assert (tmp_path / precision / "pictures/step-000001.png").exists()
    frozen, trained = {p.dtype for p in module.unet.parameters()}, {p.dtype for p in module.adapter.parameters()}
    assert frozen == {torch.bfloat16} and trained == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], rel=2e-3) and losses[0] != losses[1]


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_trained_weights_of_16_bits_are_refused(build_stage2, tmp_path, precision):
    with pytest.raises(ValueError, match=f"trainer.precision {precision}: .* use bf16-mixed"):
        trainer(tmp_path, 1, precision=precision).fit(build_stage2(context="image_encoder"), loader(0))


@pytest.mark.parametrize("ranks", [1, 2])
def test_validations_by_each_ranks_own_clock_are_refused(build_stage2, ranks):
    module = build_stage2(context="image_encoder")
    module.trainer = Trainer(accelerator="cpu", devices=ranks, strategy="ddp", logger=False, enable_checkpointing=False, val_check_interval="00:00:30:00")
    with nullcontext() if ranks == 1 else pytest.raises(ValueError, match="trainer.val_check_interval is a time.* set it to a number of batches"):
        module.setup("fit")


def test_lightnings_own_fsdp_strategy_is_refused(build_stage2):
    module = build_stage2(context="image_encoder")
    module.trainer = Mock(spec=Trainer, strategy=Mock(spec=FSDPStrategy))
    with pytest.raises(ValueError, match="fsdp` is the supported variant"):
        module.setup("fit")


def test_what_a_subclass_trains_outside_the_adapter_is_told(build_stage2, tmp_path):
    module = build_stage2()
    module.unet.mid_block.attentions[0].proj_out.weight.requires_grad_()
    with pytest.warns(UserWarning, match=r"not in the adapter's folder: unet\.mid_block\.attentions\.0\.proj_out\.weight\."):
        trainer(tmp_path, 1).fit(module, loader(0))


def test_pictures_that_the_autoencoder_cannot_divide_are_refused(build_stage2):
    """Masks and latents would be out of step by part of a position."""
    one = batch(0)
    odd = replace(one, pixel_values=one.pixel_values[..., :-1, :-1], subject_mask=one.subject_mask[..., :-1, :-1])
    with pytest.raises(ValueError, match="image_size has to be divisible by the autoencoder's"):
        build_stage2().sample_losses(odd, drop=False)


def test_a_cache_is_held_against_a_class_of_ones_own(build_stage2):
    module = build_stage2()
    assert "class" not in module.cache_identity()
    module.__class__ = type("Mine", (Stage2,), {"__module__": "mine", "__qualname__": "Mine"})
    assert module.cache_identity()["class"] == "mine.Mine"


def test_stage_2_may_start_from_a_moma_adapter(build_stage2, foundation, tmp_path):
    """On another data set, say: its subject side too, unless an IP-Adapter is trained; never of the other variant."""
    trained = build_stage2(variant="paper")
    with torch.no_grad():
        for parameter in trained.adapter.parameters():
            parameter.add_(0.1)
    save_adapter(trained.adapter, tmp_path)
    started = replace(foundation, ip_adapter=str(tmp_path))
    adapter, ip_adapter = (build_adapter(trained.base, started, Stage2Config(variant="paper", subject=subject), EMBED) for subject in (True, False))
    same = {n for n, p in adapter.named_parameters() if torch.equal(p, trained.adapter.get_parameter(n))}
    assert same == {n for n, _ in adapter.named_parameters()} and adapter.has_subject
    assert all(not layer.lambda_ for layer in ip_adapter.subject.values()) and not ip_adapter.has_subject
    with pytest.raises(ValueError, match="is a MoMA adapter of the variant 'paper', and stage2.variant is 'released'"):
        build_adapter(trained.base, started, Stage2Config(variant="released"), EMBED)


def test_decoder_context_without_a_decoder_says_what_to_set(foundation):
    with pytest.raises(ValueError, match=r"set model.init_args.decoder"):
        Stage2(foundation, Stage2Config(), OptimizerConfig())
