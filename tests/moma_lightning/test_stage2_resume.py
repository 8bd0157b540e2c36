"""Stage 2 goes on from its checkpoint: the same numbers, another variant refused, another decoder told."""

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.moma_lightning.test_stage2 import loader, trainer


def test_two_steps_kill_and_resume_equal_four_steps(build_stage2, tmp_path):
    """Checkpoints hold what is trained and its optimizer. The noise follows the step; where data go on is the datamodule's test."""

    def steps(module, folder, count, **options):
        module.on_train_batch_start = lambda batch, i: torch.manual_seed(module.global_step) and None
        callback = ModelCheckpoint(folder, save_last=True, every_n_train_steps=2, save_top_k=0)
        trainer(folder, count, callbacks=[callback], enable_checkpointing=True).fit(module, loader(0, 0, 0, 0), **options)
        return {n: p.detach().clone() for n, p in module.adapter.named_parameters()}

    undisturbed = steps(build_stage2(), tmp_path / "a", 4)
    steps(build_stage2(), tmp_path / "b", 2)
    resumed = steps(build_stage2(), tmp_path / "b", 4, ckpt_path=tmp_path / "b" / "last.ckpt")
    assert all(torch.equal(undisturbed[n], resumed[n]) for n in undisturbed)
    saved = torch.load(tmp_path / "b" / "last.ckpt", weights_only=False)["state_dict"]
    assert set(saved) == {f"adapter.{n}" for n in undisturbed}


@pytest.mark.parametrize("other", [{"variant": "paper"}, {"context": "image_encoder"}])
def test_a_checkpoint_of_another_variant_or_context_is_refused(build_stage2, tmp_path, other):
    """Their weights have the same names and shapes."""
    first = trainer(tmp_path, 1)
    first.fit(build_stage2(variant="released", context="decoder"), loader(0))
    first.save_checkpoint(tmp_path / "last.ckpt")
    ((name, value),) = other.items()
    with pytest.raises(ValueError, match=rf"last\.ckpt was trained with other options: .*\n  stage2\.{name}: .* in the checkpoint, {value} now"):
        trainer(tmp_path, 2).fit(build_stage2(**{"variant": "released", "context": "decoder"} | other), loader(0, 0), ckpt_path=tmp_path / "last.ckpt")


def test_another_decoder_in_the_same_place_is_told_when_training_goes_on(build_stage2, tmp_path):
    first = trainer(tmp_path, 1)
    first.fit(build_stage2(), loader(0))
    first.save_checkpoint(tmp_path / "last.ckpt")
    for digest, told in (("another", True), (None, False), (build_stage2().decoder_digest, False)):
        module = build_stage2()
        module.decoder_digest = digest
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            trainer(tmp_path, 2).fit(module, loader(0, 0), ckpt_path=tmp_path / "last.ckpt")
        assert any("holds other weights" in str(one.message) for one in warned) == told


def test_a_checkpoint_that_knows_no_decoder_tells_of_none(build_stage2, tmp_path, recwarn):
    """As those of before 2026-11-28."""
    first = trainer(tmp_path, 1)
    first.fit(build_stage2(), loader(0))
    first.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del checkpoint["decoder_digest"]
    torch.save(checkpoint, tmp_path / "last.ckpt")
    module = build_stage2()
    module.decoder_digest = "any"
    trainer(tmp_path, 2).fit(module, loader(0, 0), ckpt_path=tmp_path / "last.ckpt")
    assert not any("holds other weights" in str(one.message) for one in recwarn)
