import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch.utils.data import DataLoader

from moma_lightning.batch import TripletBatch, white_background
from moma_lightning.models.image_feature_decoder import DecoderConfig, ImageFeatureDecoder
from moma_lightning.modules.stage1 import EditConfig, Stage1, edited
from moma_lightning.optim import OptimizerConfig

LABELS = ["cat", "toy robot"]


def batch(seed: int, size: int = 4) -> TripletBatch:
    rng = torch.Generator().manual_seed(seed)
    label = [LABELS[(seed + i) % 2] for i in range(size)]
    return TripletBatch(
        pixel_values=torch.rand(size, 3, 20, 20, generator=rng) * 2 - 1,
        subject_mask=(torch.rand(size, 1, 20, 20, generator=rng) > 0.5).float(),
        caption=[f"a {word} on a lake" + " at night" * (i % 2) for i, word in enumerate(label)],
        label=label,
        key=[f"{seed}-{i}" for i in range(size)],
    )


def loader(*seeds: int) -> DataLoader:
    return DataLoader([batch(seed) for seed in seeds], batch_size=None)


@pytest.fixture
def build(tiny_foundation, tmp_path):
    def make(clip: bool = True, edits: EditConfig = EditConfig(), **decoder) -> Stage1:  # noqa: B008 - never changed
        seed_everything(0, verbose=False)
        folder = tiny_foundation.mllm.replace("llava", "clip") if clip else None
        return Stage1(tiny_foundation, DecoderConfig(**decoder), OptimizerConfig(lr=1e-2, warmup_steps=1), clip=folder, edits=edits)

    return make


def trainer(folder, steps: int, **options) -> Trainer:
    return Trainer(max_steps=steps, default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False,
                   enable_model_summary=False, num_sanity_val_steps=0, **{"enable_checkpointing": False, **options})


def full(seed: int) -> TripletBatch:
    plain = batch(seed)
    return replace(plain, full_caption=[caption.replace("a ", "a red ", 1) for caption in plain.caption])


def test_without_edits_the_decoder_sees_the_subject_on_white_and_the_caption():
    one = full(0)
    subject, caption = edited(one, 0.0)
    assert torch.equal(subject, white_background(one.pixel_values, one.subject_mask)) and caption == one.caption


def test_an_edited_sample_has_the_full_caption_and_other_colours_on_white():
    torch.manual_seed(0)
    one = replace(full(0), subject_mask=torch.zeros(4, 1, 20, 20).index_fill(3, torch.arange(8), 1.0))
    subject, caption = edited(one, 1.0)
    assert caption == one.full_caption != one.caption
    before = white_background(one.pixel_values, one.subject_mask)
    assert (subject[..., 12:] > 0.999).all()  # beyond the blur's reach white stays white
    assert all((a - b).abs()[..., :8].mean() > 0.05 for a, b in zip(subject, before, strict=True))
    assert subject.abs().max() <= 1 + 1e-5
    black = replace(one, pixel_values=-torch.ones(4, 3, 20, 20), subject_mask=torch.ones(4, 1, 20, 20))
    torch.testing.assert_close(edited(black, 1.0)[0], black.pixel_values)


def test_a_share_of_the_samples_is_edited_and_only_in_training(build, tmp_path):
    torch.manual_seed(0)
    edits = [text.startswith("a red") for seed in range(100) for text in edited(full(seed), 0.25)[1]]
    assert 0.15 < sum(edits) / len(edits) < 0.35
    module, seen = build(edits=EditConfig(1.0)), []
    module.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    trainer(tmp_path, 1).fit(module, DataLoader([full(0)], batch_size=None), DataLoader([full(0)], batch_size=None))
    assert seen == [full(0).full_caption, full(0).caption]  # a training step, then validation


def test_a_batch_without_full_captions_has_the_captions():
    assert batch(0).full_caption == batch(0).caption


def weights(module: Stage1) -> dict[str, torch.Tensor]:
    return copy.deepcopy(module.state_dict())


def test_training_changes_what_is_trained_and_nothing_else(build, tmp_path):
    module = build()
    before = weights(module)
    trainer(tmp_path, 2).fit(module, loader(0, 1))
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == trained | {"target_sum", "target_count"}
    assert {name.split(".")[0] for name in trained} == {"decoder"}


def test_the_loss_falls(build, tmp_path):
    module, data = build(), batch(0)

    @torch.no_grad()
    def loss():
        return (module(data) - module.target(data)).square().mean().item()

    first = loss()
    trainer(tmp_path, 30).fit(module, loader(*[0] * 30))
    assert loss() < 0.5 * first


def test_the_target_is_the_embedding_of_the_whole_picture(build):
    module, data = build(), batch(3)
    expected = module.image_encoder(data.pixel_values)
    assert torch.equal(module.target(data), expected) and not module.target(data).requires_grad
    subject = white_background(data.pixel_values, data.subject_mask)
    predicted = module.decoder(subject, data.label, data.caption)
    module.log = lambda *_, **__: None
    assert module.training_step(data, 0).item() == pytest.approx((predicted - expected).square().mean().item(), rel=1e-5)


def test_the_loss_may_be_one_minus_the_cosine(tiny_foundation):
    module, data = Stage1(tiny_foundation, DecoderConfig(), OptimizerConfig(), loss="cosine"), batch(3)
    predicted, target = module.predicted_and_target(data)
    module.log = lambda *_, **__: None
    assert module.training_step(data, 0).item() == pytest.approx(1 - torch.cosine_similarity(predicted, target).mean().item(), abs=1e-5)


def test_the_background_is_not_seen(build):
    module, data = build(), batch(3)
    other = copy.deepcopy(data)
    other.pixel_values = torch.where(data.subject_mask > 0.5, data.pixel_values, -data.pixel_values)
    assert torch.equal(module(data), module(other))
    assert not torch.equal(module.target(data), module.target(other))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_training_ends_where_an_unbroken_one_does(build, tmp_path, accumulate):
    unbroken, second = build(), build()
    every_epoch = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    options = {"max_epochs": 2, "accumulate_grad_batches": accumulate, "enable_checkpointing": True}
    trainer(tmp_path, -1, callbacks=[every_epoch], **options).fit(unbroken, loader(0, 1, 2, 3))
    path = tmp_path / "epoch=0.ckpt"
    saved = torch.load(path, weights_only=False)
    trained = {name for name, p in unbroken.named_parameters() if p.requires_grad}
    assert set(saved["state_dict"]) == trained | {"target_sum", "target_count"}
    resumed = trainer(tmp_path, -1, callbacks=[copy.deepcopy(every_epoch)], **options)
    resumed.fit(second, loader(0, 1, 2, 3), ckpt_path=path)
    assert resumed.global_step == 8 // accumulate
    for name, value in unbroken.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


@pytest.mark.parametrize("schedule, steps, options", [
    ("linear", 3, {}), ("linear", -1, {"max_epochs": 2}), ("linear", 9, {"max_epochs": 2}), ("linear", 3, {"fast_dev_run": 1}),
    ("constant", -1, {"max_epochs": 2}),
])
def test_with_scheduled_accumulation_a_falling_schedule_ends_by_steps(build, tmp_path, schedule, steps, options):
    module, run = build(), trainer(tmp_path, steps, callbacks=[GradientAccumulationScheduler({0: 2})], **options)
    module.optimizer_config.schedule = schedule
    is_refused = schedule == "linear" and "max_epochs" in options
    message = "'linear' would not .* Set trainer.max_steps, and trainer.max_epochs to -1"
    with pytest.raises(ValueError, match=message) if is_refused else nullcontext():
        run.fit(module, loader(0, 1, 2, 3))
        assert options or max(run.lr_scheduler_configs[0].scheduler.get_last_lr()) == 0


def save_checkpoint(build, folder, change):
    module = build()
    run = trainer(folder, 1)
    run.fit(module, loader(0))
    run.save_checkpoint(folder / "one.ckpt")
    checkpoint = torch.load(folder / "one.ckpt", weights_only=False)
    change(checkpoint["state_dict"])
    torch.save(checkpoint, folder / "one.ckpt")
    return folder / "one.ckpt"


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: s.pop("decoder.token"), r"one\.ckpt.*\n.*decoder\.token: missing"),
    (lambda s: s.update({"decoder.other": torch.zeros(1)}), r"decoder\.other: not expected"),
    (lambda s: s.update({"decoder.token": torch.zeros(5)}), r"decoder\.token: shape \[5\], expected \[24\]"),
], ids=["missing", "unexpected", "shape"])
def test_refuses_a_checkpoint_that_does_not_fit(build, tmp_path, change, message):
    path = save_checkpoint(build, tmp_path, change)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, 2).fit(build(), loader(0), ckpt_path=path)


def test_what_a_subclass_trains_besides_is_kept_and_asked_for(tiny_foundation, tmp_path):
    class WithHead(Stage1):
        def __init__(self):
            super().__init__(tiny_foundation, DecoderConfig(), OptimizerConfig(lr=1e-2, warmup_steps=1))
            self.head = torch.nn.Linear(self.decoder.embed_dim, self.decoder.embed_dim)

        def forward(self, batch, edit_rate=0.0):
            return self.head(super().forward(batch, edit_rate))

    trained, first = WithHead(), trainer(tmp_path, 2)
    first.fit(trained, loader(0, 1))
    first.save_checkpoint(tmp_path / "last.ckpt")
    resumed = WithHead()
    trainer(tmp_path, 2).fit(resumed, loader(0, 1), ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(resumed.head.weight, trained.head.weight)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del checkpoint["state_dict"]["head.weight"]
    with pytest.raises(ValueError, match=r"head\.weight"):
        WithHead().on_load_checkpoint(checkpoint)


def test_writes_the_decoder_at_the_end(build, tiny_foundation, tmp_path):
    module = build()
    trainer(tmp_path, 1).fit(module, loader(0))
    loaded = ImageFeatureDecoder.from_pretrained(tmp_path / "image_feature_decoder", tiny_foundation)
    data = batch(5)
    inputs = data.pixel_values, data.label, data.caption
    assert torch.equal(loaded(*inputs), module.decoder(*inputs))


def validated(module, folder, batches=None) -> dict[str, float]:
    run = trainer(folder, 2)
    run.fit(module, loader(0, 1), DataLoader(batches or [full(2), full(3)], batch_size=None))
    return {name: float(value) for name, value in run.callback_metrics.items()}


def test_validation_measures_the_decoder_beside_the_baselines(build, tmp_path, capsys):
    module = build()
    scores = validated(module, tmp_path)
    suffixes = ["", "_white_background", "_caption", "_mean"]
    assert {"val/loss", *(f"val/{key}{suffix}" for key in ("cosine", "r_at_1") for suffix in suffixes)} <= set(scores)
    data = [batch(2), batch(3)]
    targets = torch.cat([module.target(d) for d in data])
    mean = torch.cat([module.target(batch(s)) for s in (0, 1)]).mean(0)
    subject = torch.cat([module.image_encoder(white_background(d.pixel_values, d.subject_mask)) for d in data])
    captions = torch.cat([module.caption_encoder(d.caption) for d in data])
    for suffix, embeds in (("_white_background", subject), ("_caption", captions), ("_mean", mean.expand(8, -1))):
        assert scores[f"val/cosine{suffix}"] == pytest.approx(torch.cosine_similarity(embeds, targets).mean().item(), abs=1e-5)
    assert scores["val/r_at_1_mean"] == pytest.approx(1 / 8)
    assert not any(match.predicted for match in module.matches.values()), "the next validation begins anew"
    printed = capsys.readouterr().out
    assert "R@1" in printed and "CLIP text embedding of the caption" in printed


def test_what_a_rank_validates_again_counts_in_no_score(build, tmp_path):
    scores = validated(build(), tmp_path)
    data = [full(2), full(3), replace(full(4), repeated=True), replace(full(2), repeated=True)]
    again = validated(build(), tmp_path, data)
    assert again == pytest.approx(scores, abs=1e-6) and {"val/loss", "val/cosine_mean"} <= set(again)


def test_the_mean_target_counts_each_sample_alike(build):
    module, data = build(), [batch(0, 2), batch(1, 4)]
    module.log = lambda *_, **__: None
    for one in data:
        module.training_step(one, 0)
    torch.testing.assert_close(module.mean_target(), torch.cat([module.target(one) for one in data]).mean(0))


def test_without_clip_there_is_no_caption_baseline(build, tmp_path):
    scores = validated(build(clip=False), tmp_path)
    assert "val/cosine_mean" in scores and "val/cosine_caption" not in scores


def test_bf16_autocast_trains(build, tmp_path):
    module = build()
    trainer(tmp_path, 1, precision="bf16-mixed").fit(module, loader(0))
    kept = {id(p) for p in module.kept().values()}
    assert all(p.dtype == (torch.float32 if id(p) in kept else torch.bfloat16) and p.isfinite().all() for p in module.parameters())
