"""Other pipelines as methods, and stage 1 in front of a stock IP-Adapter."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, PNDMScheduler
from PIL import Image

from datamodules.dreambooth import Subject
from evaluation.cli import parse
from evaluation.methods import (
    DreamBoothLora,
    Folder,
    Models,
    Pipeline,
    Reference,
    StockIpAdapter,
    TextOnly,
    TextualInversion,
)
from evaluation.protocols import Sampler
from evaluation.tasks import PictureTask
from experiments.mini.models import MINI, mini_foundation
from moma_lightning.foundation import load_base
from moma_lightning.pipeline import MoMAPipeline
from tests.evaluation.fakes import random_picture
from tests.tiny import EMBED_DIM, tiny_adapter, tiny_base

SAMPLER = Sampler(num_inference_steps=2, guidance_scale=2.0)
SUBJECT = Subject("red_mug", "mug", False, [], None)


def task(prompt: str, seed: int) -> PictureTask:
    return PictureTask("red_mug", "mug", 0, "context", 0, prompt, 0, seed)


TASKS = [task("a mug in the snow", 1), task("a red mug", 2)]


@pytest.fixture
def reference(tmp_path) -> Reference:
    random_picture(3, (64, 64)).save(tmp_path / "00.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    return Reference(tmp_path / "00.png", tmp_path / "mask.png")


class Recorder:
    """Keeps what it is called with, which must be arguments that `like`, or this class itself, takes."""

    like = None

    def __init__(self):
        self.calls, self.scheduler = [], EulerDiscreteScheduler()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        made = cls()
        made.loaded = pretrained_model_name_or_path, kwargs
        return made

    def to(self, device):
        return self

    def set_progress_bar_config(self, disable):
        assert disable

    def __call__(self, prompt, image=None, word=None, strength=1.0, num_inference_steps=9, generator=None, **rest):
        given = {"prompt": prompt, "image": image, "word": word, "strength": strength, "steps": num_inference_steps, "generator": generator} | rest
        self.calls.append(given)
        return SimpleNamespace(images=[Image.new("RGB", (8, 8)) for _ in ([prompt] if isinstance(prompt, str) else prompt)])


def here(name: str) -> str:
    return f"{__name__}.{name}"


def test_a_pipeline_of_the_mini_base_draws_text_onlys_bits(reference):
    foreign, ours = Pipeline(f"{MINI}/base", "diffusers.StableDiffusionPipeline"), TextOnly()
    drawn = []
    for method in (foreign, ours):
        method.setup(Models(mini_foundation(sam=None)), SAMPLER)
        drawn.append([image.tobytes() for image in method.generate(SUBJECT, reference, TASKS)])
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]
    assert type(foreign.pipeline) is diffusers.StableDiffusionPipeline


def test_a_foreign_scheduler_that_leaves_things_unsaid_does_not_clip_latents(tmp_path, reference):
    """As diffusers' converters write PNDM's config: DDIM's own defaults would draw other pictures without a word."""
    shutil.copytree(f"{MINI}/base", tmp_path / "base")
    PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, skip_prk_steps=True).save_pretrained(
        tmp_path / "base/scheduler")
    foreign, ours = Pipeline(str(tmp_path / "base"), "diffusers.StableDiffusionPipeline"), TextOnly()
    drawn = []
    for method in (foreign, ours):
        method.setup(Models(mini_foundation(base=str(tmp_path / "base"), vae=None, sam=None)), replace(SAMPLER, scheduler="DDIMScheduler"))
        drawn.append([image.tobytes() for image in method.generate(SUBJECT, reference, TASKS)])
    assert drawn[0] == drawn[1] and not foreign.pipeline.scheduler.config.clip_sample


def base_with(scheduler, folder: Path) -> str:
    """The mini world's base with another scheduler."""
    shutil.copytree(f"{MINI}/base", folder / "base")
    scheduler.save_pretrained(folder / "base/scheduler")
    index = json.loads((folder / "base/model_index.json").read_text())
    (folder / "base/model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", type(scheduler).__name__]}))
    return str(folder / "base")


def test_under_no_scheduler_a_foreign_row_and_ours_have_the_bases_own(tmp_path, reference):
    """As SDXL's Euler; and the next one has the protocol's again."""
    own = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1)
    base = base_with(own, tmp_path)
    models, foreign, ours = Models(mini_foundation(base=base, vae=None, sam=None)), Pipeline(base, "diffusers.StableDiffusionPipeline"), TextOnly()
    drawn = []
    for method in (foreign, ours):
        method.setup(models, replace(SAMPLER, scheduler=None))
        assert type(method.pipeline.scheduler) is EulerDiscreteScheduler
        drawn.append([image.tobytes() for image in method.generate(SUBJECT, reference, TASKS)])
    assert drawn[0] == drawn[1]
    ours.setup(models, replace(SAMPLER, scheduler="DDIMScheduler"))
    assert type(ours.pipeline.scheduler) is DDIMScheduler


def test_a_pipeline_of_another_formulation_keeps_its_scheduler_or_is_refused(tmp_path):
    base = base_with(EDMEulerScheduler(), tmp_path)
    models, method = Models(mini_foundation(sam=None)), Pipeline(base, "diffusers.StableDiffusionPipeline")
    with pytest.raises(ValueError, match="EDMEulerScheduler has no diffusion's noise schedule, .* own_scheduler: true"):
        method.setup(models, replace(SAMPLER, scheduler="DDIMScheduler"))
    replace(method, own_scheduler=True).setup(models, SAMPLER)
    with pytest.raises(ValueError, match="has a EDMEulerScheduler: flow matching and EDM are other formulations"):
        load_base(mini_foundation(base=base))


def test_arguments_are_mapped(monkeypatch, reference):
    monkeypatch.setattr("evaluation.methods.pipelines.pkgutil.resolve_name", {here("Recorder"): Recorder}.__getitem__)
    method = Pipeline("owner/name@abc", here("Recorder"), {"prompt": "prompt", "image": "image", "word": "label"}, {"strength": 0.3})
    method.setup(Models(mini_foundation()), Sampler(num_inference_steps=2, prompt_template="photo of a {label}. {prompt}"))
    assert len(method.generate(SUBJECT, reference, TASKS)) == 2
    loaded, kwargs = method.pipeline.loaded
    assert (loaded, kwargs) == ("owner/name", {"revision": "abc", "torch_dtype": torch.float32})
    (given,) = method.pipeline.calls
    assert given["prompt"] == ["photo of a mug. a mug in the snow", "photo of a mug. a red mug"]
    assert (given["word"], given["strength"], given["steps"]) == (["mug", "mug"], 0.3, 2)
    assert given["image"].tobytes() == random_picture(3, (64, 64)).tobytes()
    assert [g.initial_seed() for g in given["generator"]] == [1, 2]
    assert type(method.pipeline.scheduler).__name__ == "DDIMScheduler"
    assert method.weights(Models(mini_foundation())) == {"pipeline": "owner/name@abc"}


def test_pictures_that_a_safety_checker_has_hidden_are_not_scored(monkeypatch, reference):
    class Hiding(Recorder):
        def __call__(self, prompt):
            return SimpleNamespace(images=super().__call__(prompt).images, nsfw_content_detected=[False, True])

    monkeypatch.setattr("evaluation.methods.pipelines.pkgutil.resolve_name", {here("Recorder"): Hiding}.__getitem__)
    method = Pipeline("owner/name", here("Recorder"))
    method.setup(Models(mini_foundation()), SAMPLER)
    with pytest.raises(ValueError, match=r"has hidden 1 of 2 pictures of red_mug.*safety_checker: null"):
        method.generate(SUBJECT, reference, TASKS)


def test_pictures_one_by_one_with_the_pipelines_own_scheduler(monkeypatch, reference):
    monkeypatch.setattr("evaluation.methods.pipelines.pkgutil.resolve_name", {here("Recorder"): Recorder}.__getitem__)
    method = Pipeline("owner/name", here("Recorder"), batched=False, own_scheduler=True)
    method.setup(Models(mini_foundation()), SAMPLER)
    assert len(method.generate(SUBJECT, reference, TASKS)) == 2
    assert [given["prompt"] for given in method.pipeline.calls] == ["a mug in the snow", "a red mug"]
    assert isinstance(method.pipeline.scheduler, EulerDiscreteScheduler)


def test_a_held_pipeline_is_that_of_the_same_class_and_options_and_comes_with_its_own_scheduler(monkeypatch):
    monkeypatch.setattr("evaluation.methods.pipelines.pkgutil.resolve_name", {here("Recorder"): Recorder}.__getitem__)
    models, rows = Models(mini_foundation()), [Pipeline("o/n", here("Recorder")), Pipeline("o/n", here("Recorder"), own_scheduler=True),
                                                Pipeline("o/n", here("Recorder"), load_kwargs={"variant": "fp16"})]
    for row in rows:
        row.setup(models, SAMPLER)
    assert rows[0].pipeline is rows[1].pipeline and isinstance(rows[1].pipeline.scheduler, EulerDiscreteScheduler)
    assert rows[2].pipeline is not rows[0].pipeline and rows[2].pipeline.loaded[1]["variant"] == "fp16"


def test_one_pipeline_is_held_on_whichever_base(monkeypatch):
    def load(foundation, *_):
        made = Mock(spec=MoMAPipeline, base=foundation.base)
        made.to.return_value = made
        return made

    monkeypatch.setattr("evaluation.methods.base.load_pipeline", load)
    models = Models(mini_foundation(base="one"))
    own = models.pipeline("adapter", "decoder")
    assert models.on_base("other").pipeline("adapter", "decoder").base == "other"
    assert len(models.held) == 1 and models.pipeline("adapter", "decoder") is not own


def test_a_mask_that_is_not_there_is_told(monkeypatch, reference):
    monkeypatch.setattr("evaluation.methods.pipelines.pkgutil.resolve_name", {here("Recorder"): Recorder}.__getitem__)
    method = Pipeline("o/n", here("Recorder"), {"prompt": "prompt", "image": "mask"})
    method.setup(Models(mini_foundation()), SAMPLER)
    with pytest.raises(ValueError, match="which has none"):
        method.generate(SUBJECT, Reference(reference.path), TASKS)


def test_what_a_pipeline_does_not_take_is_named(monkeypatch):
    with pytest.raises(ValueError, match="no class 'diffusers.NoSuchPipeline'"):
        Pipeline(f"{MINI}/base", "diffusers.NoSuchPipeline").require(Models(mini_foundation()))
    method = Pipeline(f"{MINI}/base", "diffusers.StableDiffusionPipeline", {"prompt": "prompt", "picture": "image"})
    for check in (lambda: method.require(Models(mini_foundation())), lambda: method.setup(Models(mini_foundation()), SAMPLER)):
        with pytest.raises(ValueError, match="takes no argument picture"):
            check()
    Pipeline(f"{MINI}/base", arguments=method.arguments).require(Models(mini_foundation()))  # which class it is, only its folder says
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        Pipeline("no/such/folder").weights(Models(mini_foundation()))


def stock(pipeline) -> StockIpAdapter:
    models = Models(mini_foundation(ip_adapter="ip.safetensors"), "adapter", "decoder")
    asked = []
    models.pipeline = lambda *paths: asked.append(paths) or pipeline
    method = StockIpAdapter(scale=0.8)
    method.setup(models, SAMPLER)
    assert asked == [("ip.safetensors", "decoder")]
    return method


def test_stage_1_feeds_the_stock_ip_adapter(reference):
    """Each prompt's own prediction from the subject on white; the same pictures as handing the embeddings to the pipeline."""
    base, seen = tiny_base(), []
    pipeline = MoMAPipeline.from_base(base, tiny_adapter(base))
    embeds = torch.randn(2, EMBED_DIM, generator=torch.Generator().manual_seed(0))
    pipeline.decoder = SimpleNamespace(read_picture=lambda white: white, predict=lambda *given: seen.append(given) or embeds)
    images = stock(pipeline).generate(SUBJECT, reference, TASKS)
    ((white, label, prompts),) = seen
    assert (label, prompts) == ("mug", [t.prompt for t in TASKS])
    assert white.shape == (1, 3, 64, 64), "the picture is read once"
    generators = [torch.Generator().manual_seed(t.seed) for t in TASKS]
    expected = pipeline(prompts, image_embeds=embeds, context_scale=0.8, beta=0.0, generator=generators, guidance_scale=2.0, num_inference_steps=2).images
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]


def test_stage_1_is_asked_for():
    with pytest.raises(ValueError, match="needs `decoder`"):
        StockIpAdapter().weights(Models(mini_foundation(), "adapter", None))


def test_methods_in_a_yaml(tmp_path):
    (tmp_path / "eval.yaml").write_text(
        "methods:\n"
        "  ti: {class_path: TextualInversion, init_args: {steps: 7, pictures: all}}\n"
        "  lora: {class_path: DreamBoothLora, init_args: {rank: 2}}\n"
        "  stock: StockIpAdapter\n"
        "  any: {class_path: Pipeline, init_args: {pretrained: o/n@r, arguments: {text: prompt, picture: image}, kwargs: {eta: 0.5}}}\n"
    )
    methods = parse(["generate", "--config", "experiments/mini/eval.yaml", "--config", str(tmp_path / "eval.yaml")])[1].methods
    assert methods == {
        "ti": TextualInversion(steps=7, pictures="all"),
        "lora": DreamBoothLora(rank=2),
        "stock": StockIpAdapter(),
        "any": Pipeline("o/n@r", arguments={"text": "prompt", "picture": "image"}, kwargs={"eta": 0.5}),
    }


def folder_of(tmp_path: Path, *rows: str, mark: str = "") -> Folder:
    (tmp_path / "made.csv").write_text("\n".join((f"{mark}subject,prompt,path,reference", *rows)), encoding="utf-8")
    return Folder(str(tmp_path / "made.csv"))


def test_a_row_that_names_the_reference_goes_before_one_for_all(tmp_path):
    method = folder_of(tmp_path, "red_mug,a red mug,any.png,", "red_mug,a red mug,own.png,00.png")
    method.setup(Models(mini_foundation()), SAMPLER)
    assert [method._find(TASKS[1], name).name for name in ("00.png", "01.png")] == ["own.png", "any.png"]


def test_pictures_that_change_places_change_a_folders_stamp(tmp_path):
    rows = [(f"red_mug,{first},0.png,", f"red_mug,{second},1.png,") for first, second in (("p", "q"), ("q", "p"))]
    found = [folder_of(tmp_path, *both).weights(Models(mini_foundation())) for both in rows]
    assert found[0] != found[1]


def test_a_table_with_the_mark_that_excel_writes_is_read(tmp_path):
    (row,) = folder_of(tmp_path, "red_mug,a red mug,0.png,", mark="\ufeff").rows()
    assert row["subject"] == "red_mug"
