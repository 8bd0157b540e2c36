"""`python -m moma_lightning generate` with the shipped models: files, settings, and what it says to bad input."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from datamodules.mini import world
from datamodules.mini.render import render
from experiments.mini.models import mini_foundation
from moma_lightning.__main__ import main
from moma_lightning.pipeline import MoMAPipeline

GENERATE = ["generate", "--config", "experiments/mini/generate.yaml"]


@pytest.fixture
def cat(tmp_path) -> str:
    """A rendered picture without its mask: SAM has to find the subject."""
    images, _ = render([world.sample_picture(np.random.default_rng(0), world.identity("heldout", 3, "cat"))])
    Image.fromarray(images[0]).save(tmp_path / "cat.png")
    return str(tmp_path / "cat.png")


def generate(out: Path, prompts: list[str], *options: str) -> dict[str, np.ndarray]:
    """Pictures by file name. The shipped IP-Adapter stands for a trained adapter."""
    fixed = ["--out", str(out), "--num_inference_steps", "2", "--device", "cpu", "--adapter", str(mini_foundation().ip_adapter), "--decoder", "null"]
    assert main([*GENERATE, "--prompt", json.dumps(prompts), *fixed, *options]) == 0
    return {path.name: np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))}


def test_pictures_that_are_there_stay(tmp_path):
    first = generate(tmp_path, ["a cat"])
    both = generate(tmp_path, ["a cat", "一只猫"], "--seed", "7")
    assert list(both) == ["000-a-cat.png", "001-a-cat.png", "002-一只猫.png"] and np.array_equal(both["000-a-cat.png"], first["000-a-cat.png"])
    assert not np.array_equal(both["001-a-cat.png"], first["000-a-cat.png"])


@pytest.mark.parametrize(("options", "told"), [
    (["--prompt", "[]"], "0 prompts"), (["--prompt", "a cat", "--num_images_per_prompt", "0"], "num_images_per_prompt 0"),
    (["--prompt", "a cat", "--num_inference_steps", "-5"], "num_inference_steps -5"), (["--prompt", "a cat", "--prompt_template", "{foo}"], "'{foo}' may have"),
    (["--prompt", "a cat", "--out", __file__], "File exists"), (["--prompt", "a cat", "--batch_size", "0"], "batch_size 0"),
    (["--prompt", "a cat", "--label", "cat"], "give it as --image"), (["--prompt", "a cat", "--beta", "-1"], "beta -1"),
    (["--prompt", "a cat", "--guidance_scale", "-1"], "guidance_scale -1"),
])
def test_options_that_cannot_be_are_told(options, told, tmp_path):
    with pytest.raises(SystemExit, match=told):
        main([*GENERATE, "--out", str(tmp_path), "--device", "cpu", *options])


def test_pictures_are_written_with_their_settings(cat, tmp_path, caplog):
    made = generate(tmp_path / "out", ["a cat on the beach", "a cat / in the snow"], "--image", cat, "--label", "cat", "--num_images_per_prompt", "2")
    assert list(made) == ["000-a-cat-on-the-beach.png", "001-a-cat-on-the-beach.png", "002-a-cat-in-the-snow.png", "003-a-cat-in-the-snow.png"]
    settings = json.loads((tmp_path / "out" / "003-a-cat-in-the-snow.json").read_text())
    assert settings["seed"] == 3 and settings["label"] == "cat" and settings["prompt"] == "a cat / in the snow" and settings["beta"] == 1.0
    assert " entries, 0 missing, 0 unexpected, 0 of another shape" in caplog.text, "what was read of the adapter is not told"


def test_batches_are_written_one_by_one_and_draw_the_same(cat, tmp_path, monkeypatch):
    """The second of two ends in an error: what the first drew is there."""
    prompts, reference = ["a cat on the beach", "a cat in the snow"], ("--image", cat, "--label", "cat", "--num_images_per_prompt", "2")
    whole = generate(tmp_path / "whole", prompts, *reference)
    parts = generate(tmp_path / "parts", prompts, *reference, "--batch_size", "3")
    assert list(parts) == list(whole) and all(np.abs(whole[name].astype(int) - parts[name]).max() <= 1 for name in whole)
    calls = iter([MoMAPipeline.__call__])
    monkeypatch.setattr(MoMAPipeline, "__call__", lambda *given, **options: next(calls)(*given, **options))
    with pytest.raises(StopIteration):
        generate(tmp_path / "cut", prompts, *reference, "--batch_size", "3")
    assert [path.name for path in sorted((tmp_path / "cut").glob("*.png"))] == list(whole)[:3]


def test_the_reference_changes_the_picture_and_the_seed_fixes_it(cat, tmp_path):
    prompts, subject = ["a cat on the beach"], ("--image", cat, "--label", "cat")
    (alone,), (first,), (again,) = (generate(tmp_path / name, prompts, *options).values() for name, options in (("a", ()), ("b", subject), ("c", subject)))
    assert np.array_equal(first, again) and not np.array_equal(alone, first)
    alone, first = (json.loads(next((tmp_path / name).glob("*.json")).read_text()) for name in "ab")
    assert [alone["adapter"], alone["decoder"]] == [None, None] and first["adapter"] == str(mini_foundation().ip_adapter)
    assert alone["foundation"] == first["foundation"] == asdict(mini_foundation())


def test_each_sampler_option_reaches_the_sampler_and_the_record(cat, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(MoMAPipeline, "__call__", lambda pipe, *_, **options: given.update(options) or SimpleNamespace(images=[Image.new("RGB", (64, 64))]))
    options = {"beta": 0.5, "mask_strength": 0.25, "guide_subject": True, "guidance_scale": 2.5}
    texts = [text for name, value in options.items() for text in (f"--{name}", json.dumps(value))]
    generate(tmp_path / "out", ["a cat on the beach"], "--image", cat, "--label", "cat", *texts)
    written = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert {name: given[name] for name in options} == {name: written[name] for name in options} == options


@pytest.mark.parametrize("options, message", [
    (("--label", "dog"), "'dog' does not occur in the prompt"),
    ((), "needs an adapter .* and a label"),
    (("--prompt_template", "photo of a {label}. {prompt}"), "asks for a label: give --label"),
])
def test_what_cannot_be_done_is_said(cat, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        generate(tmp_path / "out", ["a cat on the beach"], "--image", cat, *options)


def test_a_transparent_picture_is_one_on_white(cat, tmp_path):
    picture = Image.open(cat).convert("RGBA")
    seen = np.zeros((64, 64), np.uint8)
    seen[16:48, 16:48] = 255
    hidden = np.where(seen[..., None] > 0, np.asarray(picture), 0)  # black where it is transparent, as programs leave it
    Image.fromarray(np.dstack([hidden[..., :3], seen]).astype(np.uint8), "RGBA").save(tmp_path / "transparent.png")
    Image.composite(picture, Image.new("RGBA", (64, 64), "white"), Image.fromarray(seen)).convert("RGB").save(tmp_path / "white.png")
    made = [generate(tmp_path / name, ["a cat on the beach"], "--image", str(tmp_path / f"{name}.png"), "--label", "cat") for name in ("transparent", "white")]
    assert np.array_equal(*(picture for (picture,) in (part.values() for part in made)))


def test_a_cut_off_picture_is_named(cat, tmp_path):
    cut = tmp_path / "cut.png"
    cut.write_bytes(Path(cat).read_bytes()[:500])
    with pytest.raises(SystemExit, match="cut.png"):
        generate(tmp_path / "out", ["a cat on the beach"], "--image", str(cut), "--label", "cat")
