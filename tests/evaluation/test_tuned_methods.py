"""Textual Inversion and DreamBooth-LoRA on tiny random models: what is trained, what is kept, and that the base comes back."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from datamodules.dreambooth import Subject
from evaluation.generation import generate
from evaluation.methods import DreamBoothLora, Models, Reference, TextOnly, TextualInversion
from evaluation.methods.textual_inversion import PLACEHOLDER, label_embedding
from evaluation.methods.tuned import encode, noise_prediction_loss, reworded
from evaluation.plan import Evaluation
from evaluation.protocols import Sampler
from evaluation.stamps import read_stamp
from evaluation.tasks import PictureTask
from experiments.mini.models import mini_foundation
from moma_lightning.pipeline import MoMAPipeline
from tests.evaluation.fakes import fake_config, random_picture
from tests.tiny import tiny_base, tiny_sdxl_base

SAMPLER = Sampler(num_inference_steps=2, guidance_scale=2.0)
TUNED = {"ti": lambda **o: TextualInversion(steps=2, **o), "lora": lambda **o: DreamBoothLora(steps=2, **({"learning_rate": 1e-2} | o))}


def state(pipeline) -> str:
    """Digest of every parameter's name and bits, of the tokenizer's length and of the modules' classes."""
    digest = hashlib.sha256(str(len(pipeline.tokenizer)).encode())
    for model in (pipeline.unet, pipeline.text_encoder):
        for name, module in model.named_modules():
            digest.update(f"{name} {type(module).__name__}".encode())
        for name, parameter in model.state_dict().items():
            digest.update(name.encode() + parameter.numpy().tobytes())
        digest.update(str([name for name, p in model.named_parameters() if p.requires_grad]).encode())
        digest.update(str(sorted(set(vars(model)) - {"_hf_peft_config_loaded"})).encode())
    return digest.hexdigest()


@pytest.fixture
def pipeline():
    return MoMAPipeline.from_base(tiny_base())


@pytest.fixture
def subject(tmp_path) -> Subject:
    paths = [tmp_path / "mug" / f"{i}.png" for i in range(2)]
    paths[0].parent.mkdir()
    for i, path in enumerate(paths):
        random_picture(i).save(path)
    return Subject("red_mug", "mug", False, paths, None)


def task(prompt: str = "a mug in the snow", seed: int = 1) -> PictureTask:
    return PictureTask("red_mug", "mug", 0, "context", 0, prompt, 0, seed)


def ready(method, pipeline, folder: Path | None = None):
    models = Models(mini_foundation())
    models.pipeline = lambda adapter, decoder: pipeline
    models.digest = lambda path: str(path)
    method.folder = folder
    method.setup(models, SAMPLER)
    return method


def pixels(images) -> torch.Tensor:
    return torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images])


@pytest.mark.parametrize("kind", TUNED)
def test_the_base_is_put_back(kind, pipeline, subject):
    """The next method finds the same bits, the same modules and the same pictures."""
    before, drawn = state(pipeline), ready(TextOnly(), pipeline).generate(subject, Reference(subject.images[0]), [task()])
    method = ready(TUNED[kind](), pipeline)
    tuned = method.generate(subject, Reference(subject.images[0]), [task()])
    assert state(pipeline) == before
    assert torch.equal(pixels(ready(TextOnly(), pipeline).generate(subject, Reference(subject.images[0]), [task()])), pixels(drawn))
    assert not torch.equal(pixels(tuned), pixels(drawn))


def test_on_sdxl_lora_trains(subject):
    pipeline, given = MoMAPipeline.from_base(tiny_sdxl_base()), (subject, Reference(subject.images[0]), [task()])
    before, drawn = state(pipeline), ready(TextOnly(), pipeline).generate(*given)
    tuned = ready(TUNED["lora"](), pipeline).generate(*given)
    assert not torch.equal(pixels(tuned), pixels(drawn)) and state(pipeline) == before


@pytest.mark.parametrize("file", [None, "base.safetensors"])
def test_textual_inversion_refuses_sdxl_before_anything_is_loaded(tmp_path, file):
    parts = {"_class_name": "StableDiffusionXLPipeline", **{part: ["diffusers", "Any"] for part in ("unet", "vae", "text_encoder", "text_encoder_2")}}
    (tmp_path / "model_index.json").write_text(json.dumps(parts))
    foundation = mini_foundation(base=file, base_config=str(tmp_path)) if file else mini_foundation(base=str(tmp_path))
    with pytest.raises(ValueError, match="SDXL.* reads prompts with two: use DreamBoothLora"):
        TUNED["ti"]().require(Models(foundation))


@pytest.mark.parametrize("kind", TUNED)
def test_the_base_is_put_back_after_an_error(kind, pipeline):
    before, method = state(pipeline), ready(TUNED[kind](), pipeline)
    tuned = method.tuned("mug")
    tuned.__enter__()
    assert state(pipeline) != before
    assert not tuned.__exit__(RuntimeError, RuntimeError(), None)
    assert state(pipeline) == before


@pytest.mark.parametrize("kind", TUNED)
def test_training_lowers_the_loss_on_the_picture(kind, pipeline, subject):
    picture = Image.open(subject.images[0])
    options = {"ti": {"learning_rate": 0.05}, "lora": {"learning_rate": 5e-3}}[kind]
    method = ready(TUNED[kind](**options), pipeline)
    method.steps, method.batch_size = 40, 4

    def loss(weights) -> float:
        with method.tuned("mug", weights), torch.no_grad():
            moments = encode(pipeline, [picture], (64, 64)).expand(16, -1, -1, -1)
            method.batch_size = 16
            captions = method.captions("mug", np.random.default_rng(5))
            method.batch_size = 4
            return noise_prediction_loss(pipeline, moments, captions, torch.Generator().manual_seed(5)).item()

    before = loss(None)
    assert loss(method.fit("mug", [picture])) < before - 1e-4


def test_only_the_new_row_is_trained(pipeline, subject):
    """Also by weight decay; and the row starts as the label's."""
    table = pipeline.text_encoder.get_input_embeddings()
    before = table.weight.clone()
    method = ready(TextualInversion(steps=2), pipeline)
    with method.tuned("mug") as parameters:
        start = parameters["token"].detach().clone()
    weights = method.trained(subject, Reference(subject.images[0]))
    ids = pipeline.tokenizer("mug", add_special_tokens=False).input_ids
    torch.testing.assert_close(start, before[ids].mean(0))
    assert set(weights) == {"token"}
    assert not torch.equal(weights["token"], start)
    assert torch.equal(table.weight, before)


def test_the_placeholder_is_one_token_with_the_trained_embedding(pipeline):
    token = torch.full((32,), 0.5)
    with ready(TextualInversion(), pipeline).tuned("mug", {"token": token}):
        ids = pipeline.tokenizer(f"a {PLACEHOLDER} in the snow", add_special_tokens=False, return_tensors="pt").input_ids
        known = pipeline.tokenizer("a mug in the snow", add_special_tokens=False, return_tensors="pt").input_ids
        embedded, plain = (pipeline.text_encoder.get_input_embeddings()(x)[0] for x in (ids, known))
    assert torch.equal(embedded[1], token)
    assert torch.equal(embedded[[0, 2, 3, 4]], plain[[0, 2, 3, 4]])


def test_labels_of_several_tokens_start_from_their_mean(pipeline):
    table = pipeline.text_encoder.get_input_embeddings()
    ids = pipeline.tokenizer("toy robot", add_special_tokens=False).input_ids
    assert len(ids) > 1
    torch.testing.assert_close(label_embedding(pipeline.tokenizer, table, "toy robot"), torch.stack([table.weight[i] for i in ids]).mean(0))


def test_lora_is_what_peft_documents(pipeline):
    """Every attention projection becomes W x + (alpha / r) B A x, also through the project's own attention processors."""
    method, layer = ready(DreamBoothLora(rank=3), pipeline), "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    x, unet = torch.randn(2, 5, 32), pipeline.unet
    plain = unet.get_submodule(layer)(x)
    with method.tuned("mug") as parameters, torch.no_grad():
        for parameter in parameters.values():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        a, b = (parameters[f"{layer}.lora_{m}.default.weight"] for m in "AB")
        torch.testing.assert_close(unet.get_submodule(layer)(x), plain + x @ a.T @ b.T)
    layers = {name.split(".lora_")[0] for name in parameters}
    expected = {n for n, _ in unet.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))}
    assert layers == expected
    assert len(expected) == 4 * len(unet.attn_processors)


def test_untrained_lora_changes_nothing(pipeline, subject):
    method = ready(DreamBoothLora(steps=0), pipeline)
    inputs = torch.randn(1, 4, 8, 8), 5, torch.randn(1, 7, 32)
    plain = pipeline.unet(*inputs).sample
    with method.tuned("mug"):
        torch.testing.assert_close(pipeline.unet(*inputs).sample, plain)


@pytest.mark.parametrize("kind", TUNED)
def test_training_repeats_bit_for_bit(kind, pipeline, subject):
    first, second = (ready(TUNED[kind](), pipeline).trained(subject, Reference(subject.images[0])) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = ready(TUNED[kind](seed=1), pipeline).trained(subject, Reference(subject.images[0]))
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("kind", TUNED)
def test_a_subject_is_trained_once(kind, pipeline, subject, tmp_path, monkeypatch):
    """A new process reads what the killed one trained; other options, or another picture, train anew."""
    method = ready(TUNED[kind](), pipeline, tmp_path)
    weights = method.trained(subject, Reference(subject.images[0]))
    assert [p.parent.name for p in tmp_path.rglob("trained-*.safetensors")] == ["red_mug"]
    fresh, calls = ready(TUNED[kind](), pipeline, tmp_path), []
    monkeypatch.setattr(type(method), "fit", lambda self, label, pictures: calls.append(label) or weights)
    read = fresh.trained(subject, Reference(subject.images[0]))
    assert not calls
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    fresh.trained(subject, Reference(subject.images[1]))
    ready(TUNED[kind](seed=1), pipeline, tmp_path).trained(subject, Reference(subject.images[0]))
    assert len(calls) == 2


@pytest.mark.parametrize("pictures, count", [("reference", 1), ("all", 2)])
def test_pictures_to_train_on(pictures, count, pipeline, subject, monkeypatch):
    seen = []
    method = ready(DreamBoothLora(pictures=pictures, steps=0), pipeline)
    monkeypatch.setattr(type(method), "fit", lambda self, label, pictures: seen.extend(pictures) or {})
    method.trained(subject, Reference(subject.images[0]))
    assert [picture.tobytes() for picture in seen] == [random_picture(i).tobytes() for i in range(count)]


def test_the_stamp_covers_all_pictures_that_were_trained_on(tmp_path):
    config = fake_config(tmp_path, {"one": TextualInversion(), "all": TextualInversion(pictures="all")})
    evaluation = Evaluation.open(config)
    one, every = (evaluation.planned(name, method)[0].settings["input"] for name, method in config.methods.items())
    assert set(one) == {"image", "mask"}
    assert set(every["others"]) == {"00.png", "01.png", "02.png"}
    assert every["others"]["00.png"] == every["image"]


def test_prompts_get_the_trained_word():
    assert TextualInversion().worded(task()).prompt == f"a {PLACEHOLDER} in the snow"
    assert DreamBoothLora().worded(task("a red mug")).prompt == "a red sks mug"
    assert reworded(task("a mug on a mug"), "X") == PictureTask("red_mug", "X", 0, "context", 0, "a X on a mug", 0, 1)
    with pytest.raises(ValueError, match="does not name 'mug'"):
        reworded(task("a cat"), "X")


def test_training_texts(pipeline):
    random = np.random.default_rng(0)
    texts = ready(TextualInversion(batch_size=200), pipeline).captions("mug", random)
    assert len(set(texts)) == 27
    assert all(PLACEHOLDER in text for text in texts)
    assert DreamBoothLora(batch_size=2).captions("mug", random) == ["a photo of sks mug"] * 2


def test_textual_inversion_trains_on_mirrored_pictures_too():
    picture = random_picture(3)
    plain, mirrored = TextualInversion().augmented([picture])
    assert (plain.tobytes(), mirrored.tobytes()) == (picture.tobytes(), ImageOps.mirror(picture).tobytes())


def test_pictures_are_cut_to_the_protocols_shape(pipeline):
    """Not squashed: a tall picture's latents are those of its middle square."""
    tall = random_picture(1, (64, 128))
    middle = tall.crop((0, 32, 64, 96))
    torch.testing.assert_close(encode(pipeline, [tall], (64, 64)), encode(pipeline, [middle], (64, 64)))
    assert encode(pipeline, [tall], (128, 64)).shape == (1, 8, 16, 8)


def test_the_loss_is_equation_1(pipeline):
    """Against a plain computation with the same draws."""
    moments = encode(pipeline, [random_picture(1)], (64, 64))
    loss = noise_prediction_loss(pipeline, moments, ["a mug"], torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    mean, log_variance = moments[:, :4], moments[:, 4:].clamp(-30, 20)
    latents = (mean + torch.exp(log_variance) ** 0.5 * torch.randn(mean.shape, generator=generator)) * pipeline.vae.config.scaling_factor
    noise, t = torch.randn(mean.shape, generator=generator), torch.randint(1000, (1,), generator=generator)
    alpha = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[t].float()
    ids = pipeline.tokenizer("a mug", padding="max_length", max_length=24, return_tensors="pt").input_ids
    text = pipeline.text_encoder(ids).last_hidden_state
    predicted = pipeline.unet(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, t, text).sample
    torch.testing.assert_close(loss, ((predicted - noise) ** 2).mean(), rtol=1e-4, atol=1e-5)


def test_generate_trains_once_a_subject_under_the_trainer(tmp_path, monkeypatch, pipeline):
    """Gradients flow inside predict_step, and what was trained lies beside the pictures."""
    config = fake_config(tmp_path, {"lora": TUNED["lora"]()}, {"sampler": {"num_inference_steps": 2}})
    monkeypatch.setattr(Models, "pipeline", lambda self, adapter, decoder: pipeline)
    monkeypatch.setattr(Models, "digest", lambda self, path: str(path))
    generate(config)
    kept = sorted(config.pictures.rglob("*.safetensors"))
    assert [path.parent.name for path in kept] == ["old_boot", "red_mug", "tabby"]
    made = sorted(config.pictures.rglob("*.png"))
    assert len(made) == 9
    assert read_stamp(made[0])["settings"]["method"] == config.methods["lora"].options()
