import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from PIL import Image

from datamodules.dreambooth import DreamBooth, Subject
from evaluation.generation import generate
from evaluation.methods import Folder, IpAdapter, Models, Moma, Reference, TextOnly
from evaluation.methods.base import use_scheduler
from evaluation.plan import Evaluation
from evaluation.protocols import Sampler, named
from evaluation.tasks import PictureTask, tasks_of
from experiments.mini.models import PROTOCOL, mini_foundation
from moma_lightning.pipeline import MoMAPipeline
from tests.evaluation.fakes import fake_config, random_picture, write_data
from tests.tiny import EMBED_DIM, tiny_adapter, tiny_base, tiny_sdxl_base

SAMPLER = Sampler(num_inference_steps=2, guidance_scale=2.0, beta=0.7, mask_strength=0.5)


class Recorder:
    """A pipeline that keeps what it is called with."""

    def __init__(self):
        self.calls, self.device = [], torch.device("cpu")
        self.scheduler = EulerDiscreteScheduler()
        self.clip = lambda pixels: pixels.mean((2, 3))
        self.prepared = []

    def default_size(self):
        return 8

    def prepare_subject(self, image, mask, label, area):
        self.prepared.append(SimpleNamespace(image=image, mask=mask, label=label, area=area))
        return self.prepared[-1]

    def __call__(self, prompts, **given):
        self.calls.append({"prompts": prompts, **given})
        return SimpleNamespace(images=[Image.new("RGB", (8, 8)) for _ in prompts])


@pytest.fixture
def evaluation(tmp_path) -> Evaluation:
    config = fake_config(tmp_path, {})
    protocol = named(PROTOCOL, {"context_prompts": 2, "texture_prompts": 1})
    return Evaluation(config, protocol, DreamBooth(write_data(tmp_path / "data")), config.models())


def call(method, evaluation, pipeline, sampler=SAMPLER) -> dict:
    """What the pipeline receives from a method for the first subject."""
    foundation = mini_foundation(ip_adapter="ip.safetensors")
    models = Models(foundation, "adapter", "decoder")
    models.pipeline = lambda adapter, decoder: pipeline
    method.setup(models, sampler)
    subject = evaluation.subjects[0]
    tasks = list(tasks_of(evaluation.protocol, evaluation.data, subject))
    assert len(method.generate(subject, evaluation.reference(subject, 0), tasks)) == 3
    return pipeline.calls[-1] | {"tasks": tasks}


def test_every_method_gets_the_same_noise_and_sampler(evaluation):
    calls = [call(method, evaluation, Recorder()) for method in (TextOnly(), IpAdapter(), Moma())]
    for given in calls:
        seeds = [generator.initial_seed() for generator in given["generator"]]
        assert seeds == [task.seed for task in given["tasks"]]
        assert {g.device.type for g in given["generator"]} == {"cpu"}
        assert given["prompts"] == [task.prompt for task in given["tasks"]]
        assert (given["num_inference_steps"], given["guidance_scale"]) == (2, 2.0)


def test_moma_is_given_picture_mask_and_label(evaluation):
    given = call(Moma(), evaluation, Recorder())
    assert given["image"].label == "mug" and given["image"].area == 64
    assert given["image"].image.size == given["image"].mask.size == (24, 24)
    assert (given["beta"], given["mask_strength"], given["context_scale"]) == ([0.7] * 3, 0.5, 1.0)
    assert "image_embeds" not in given
    given = call(Moma(beta=0.0, mask_strength=1.0, context_scale=0.3, num_inference_steps=5, guidance_scale=4.0), evaluation, Recorder())
    assert (given["beta"], given["mask_strength"], given["context_scale"]) == ([0.0] * 3, 1.0, 0.3)
    assert (given["num_inference_steps"], given["guidance_scale"]) == (5, 4.0)
    given = call(Moma(mask_threshold=0.4, mask_layers=[1, 3], guide_subject=True), evaluation, Recorder())
    assert (given["mask_threshold"], given["mask_layers"], given["guide_subject"]) == (0.4, [1, 3], True)


def test_a_reference_is_prepared_once_for_all_its_batches(evaluation):
    method, pipeline = Moma(), Recorder()
    call(method, evaluation, pipeline)
    subject, other = evaluation.subjects[:2]
    reference = evaluation.reference(subject, 0)
    tasks = list(tasks_of(evaluation.protocol, evaluation.data, subject))
    method.generate(subject, reference, tasks[:1])
    method.generate(subject, reference, tasks[1:])
    assert len(pipeline.prepared) == 1 and all(given["image"] is pipeline.prepared[0] for given in pipeline.calls)
    method.generate(other, evaluation.reference(other, 0), list(tasks_of(evaluation.protocol, evaluation.data, other)))
    assert [made.label for made in pipeline.prepared] == [subject.label, other.label]
    call(method, evaluation, pipeline)
    assert len(pipeline.prepared) == 3, "another setup may bring other weights"


def test_a_setup_forgets_what_was_prepared_before_it(evaluation):
    """Another one may bring other weights."""
    method, pipeline = Moma(), Recorder()
    first, second = (call(method, evaluation, pipeline)["image"] for _ in range(2))
    assert first is pipeline.prepared[0] and second is pipeline.prepared[1]


def test_a_reference_is_prepared_of_the_samplers_size_and_anew_for_another_label(evaluation):
    method, pipeline, subject = Moma(), Recorder(), evaluation.subjects[0]
    method.pipeline, method.sampler = pipeline, replace(SAMPLER, height=32, width=64)
    found = [method.prepared(replace(subject, label=label), evaluation.reference(subject, 0)) for label in ("cat", "cat", "toy")]
    assert [made.label for made in found] == ["cat", "cat", "toy"]
    assert [(made.label, made.area) for made in pipeline.prepared] == [("cat", 32 * 64), ("toy", 32 * 64)]


def test_a_solver_of_its_own(evaluation):
    pipeline = Recorder()
    call(Moma(scheduler="UniPCMultistepScheduler"), evaluation, pipeline)
    assert type(pipeline.scheduler).__name__ == "UniPCMultistepScheduler"
    call(Moma(), evaluation, pipeline)
    assert type(pipeline.scheduler).__name__ == SAMPLER.scheduler, "the next method has the protocol's again"


def test_a_held_pipeline_comes_back_with_its_own_scheduler():
    models, pipeline = Models(mini_foundation()), SimpleNamespace(scheduler="own", to=lambda device: pipeline)
    models.hold("key", lambda: pipeline).scheduler = "that of a method"
    assert models.hold("key", lambda: pytest.fail("loaded again")).scheduler == "own"


def test_one_pipeline_is_held_at_a_time():
    models = Models(mini_foundation())
    for key in ("first", "second"):
        models.hold(key, torch.nn.Identity)
    assert list(models.held) == ["second"]


def test_texture_prompts_may_have_a_beta_of_their_own(evaluation):
    given = call(Moma(beta=1.0, texture_beta=0.4), evaluation, Recorder())
    assert [(task.kind, beta) for task, beta in zip(given["tasks"], given["beta"], strict=True)] == [("context", 1.0), ("context", 1.0), ("texture", 0.4)]


def test_a_texture_beta_of_zero_is_for_texture_prompts_alone(evaluation):
    method, pipeline, subject = Moma(texture_beta=0.0), Recorder(), evaluation.subjects[0]
    method.pipeline, method.sampler = pipeline, SAMPLER
    tasks = [PictureTask("mug", "mug", 0, kind, 0, "a mug", 0, 0) for kind in ("context", "texture", "accessory", "pose", "camera")]
    method.generate(subject, evaluation.reference(subject, 0), tasks)
    assert pipeline.calls[0]["beta"] == [0.7, 0.0, 0.7, 0.7, 0.7]


def test_clip_can_stand_in_for_the_mllm(evaluation):
    given = call(Moma(context="image"), evaluation, Recorder())
    assert torch.equal(given["image_embeds"], call(IpAdapter(), evaluation, Recorder())["image_embeds"])


def test_text_only_sees_no_picture(evaluation):
    given = call(TextOnly(), evaluation, Recorder())
    assert not {"image", "mask", "image_embeds"} & set(given)
    assert not TextOnly.uses_reference


def test_ip_adapter_sees_the_clip_embedding_of_the_whole_picture(evaluation):
    given = call(IpAdapter(scale=0.6), evaluation, Recorder())
    reference = Image.open(evaluation.subjects[0].images[0])
    expected = torch.tensor([sum(channel.getdata()) / 576 / 127.5 - 1 for channel in reference.split()])
    torch.testing.assert_close(given["image_embeds"], expected[None], rtol=1e-4, atol=1e-4)
    assert (given["beta"], given["context_scale"]) == (0.0, 0.6)
    assert "image" not in given


def test_scheduler_and_template_come_from_the_protocol(evaluation):
    pipeline = Recorder()
    sampler = Sampler(scheduler="DDIMScheduler", prompt_template="photo of a {label}. {prompt}")
    given = call(TextOnly(), evaluation, pipeline, sampler)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert given["prompts"][0] == f"photo of a mug. {given['tasks'][0].prompt}"
    with pytest.raises(ValueError, match="NoSuchScheduler"):
        call(TextOnly(), evaluation, pipeline, Sampler(scheduler="NoSuchScheduler"))


def test_what_a_pipelines_scheduler_leaves_out_is_stable_diffusions():
    pipeline = SimpleNamespace(scheduler=PNDMScheduler())
    use_scheduler(pipeline, Sampler(scheduler="DDIMScheduler"))
    assert pipeline.scheduler.config.steps_offset == 1 and not pipeline.scheduler.config.clip_sample


def test_the_mllm_reads_the_prompt_without_the_bases_template(evaluation):
    given = call(Moma(), evaluation, Recorder(), Sampler(prompt_template="photo of a {label}. {prompt}"))
    assert given["mllm_prompt"] == [task.prompt for task in given["tasks"]]
    assert given["prompts"] == [f"photo of a mug. {text}" for text in given["mllm_prompt"]]


def test_masks_from_the_data_only_where_the_protocol_says(tmp_path, evaluation):
    assert evaluation.reference(evaluation.subjects[0], 1).mask_path.name == "01.png"
    sam = Evaluation(evaluation.config, named("dreambooth"), evaluation.data, evaluation.models)
    assert sam.reference(sam.subjects[0], 1).mask is None


@pytest.mark.parametrize("make", [tiny_base, tiny_sdxl_base])
@pytest.mark.parametrize("method", [Moma(beta=1.0), IpAdapter(), TextOnly()])
def test_the_real_pipeline_takes_what_methods_give(evaluation, method, make):
    base = make()
    pipeline = MoMAPipeline.from_base(base, tiny_adapter(base) if not isinstance(method, TextOnly) else None)
    pipeline.clip = lambda pixels: torch.ones(1, EMBED_DIM) * pixels.mean()
    models = Models(mini_foundation(), "adapter", "decoder")
    models.pipeline = lambda adapter, decoder: pipeline
    method.setup(models, SAMPLER)
    subject = evaluation.subjects[0]
    tasks = list(tasks_of(evaluation.protocol, evaluation.data, subject))
    images = method.generate(subject, evaluation.reference(subject, 0), tasks)
    alone = method.generate(subject, evaluation.reference(subject, 0), tasks[1:2])
    assert [image.size for image in images] == [(64, 64)] * 3
    difference = torch.tensor(list(images[1].getdata())).float() - torch.tensor(list(alone[0].getdata()))
    assert difference.abs().max() <= 2  # a picture does not depend on its batch


def test_a_reference_is_read_as_the_data_module_reads_it(tmp_path):
    """What is transparent is white."""
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "00.png")
    assert Reference(tmp_path / "00.png").image.getpixel((0, 0)) == (255, 255, 255)


def test_a_context_of_clip_needs_no_decoder():
    assert Moma(context="image").checkpoints(Models(mini_foundation(), "adapter", None)) == ("adapter", None)


def test_missing_checkpoints_are_named():
    with pytest.raises(ValueError, match="`adapter` .* and `decoder`"):
        Moma().weights(Models(mini_foundation(), None, None))
    with pytest.raises(ValueError, match="foundation.ip_adapter"):
        IpAdapter().weights(Models(mini_foundation(ip_adapter=None)))
    with pytest.raises(FileNotFoundError, match="no/such/base"):
        TextOnly().weights(Models(mini_foundation(base="no/such/base")))


def write_folder(folder: Path, evaluation: Evaluation, skip: int = 0, **same: str) -> str:
    """A CSV and pictures for every task of the evaluation, each of a colour of its own. same: further columns."""
    folder.mkdir()
    tasks = [task for subject in evaluation.subjects for task in tasks_of(evaluation.protocol, evaluation.data, subject)]
    with (folder / "made.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "prompt", "path", *same])
        for i, task in enumerate(tasks[: len(tasks) - skip]):
            random_picture(100 + i).save(folder / f"{i}.png")
            writer.writerow([task.subject, task.prompt, f"{i}.png", *same.values()])
    return str(folder / "made.csv")


def test_folder_brings_each_picture_to_its_place(tmp_path):
    config = fake_config(tmp_path, {}, {"pictures_per_prompt": 2})
    config.methods["theirs"] = Folder(write_folder(tmp_path / "theirs", Evaluation.open(config)))
    generate(config)
    plans = Evaluation.open(config).planned("theirs", config.methods["theirs"])
    for i, plan in enumerate(plans):
        assert Image.open(plan.path).tobytes() == random_picture(100 + i).tobytes()


@pytest.mark.parametrize(("column", "told"), [
    ({}, r"made.csv: 'red_mug' is drawn from 3 references, .* add the column reference"), ({"reference": ""}, "made.csv: 'red_mug' is drawn from 3"),
    ({"reference": "00.png"}, "names no picture number 1 of subject 'red_mug', reference '01.png'"), ({"reference": "*"}, None),
])
def test_a_folder_says_from_which_of_several_references_its_pictures_are(tmp_path, column, told):
    """Else one made from 00.png would be scored against it, as against another picture of the subject, under 01.png."""
    config = fake_config(tmp_path, {}, {"references": "every", "comparison": "others"})
    config.methods["theirs"] = Folder(write_folder(tmp_path / "theirs", Evaluation.open(config), **column))
    if told is None:
        generate(config)
        assert len(list((config.pictures / "theirs").rglob("*.png"))) == 3 * 3 * 3
    else:
        with pytest.raises(ValueError, match=told):
            generate(config)


def test_a_folders_prompt_of_two_kinds_may_have_pictures_for_each(tmp_path):
    """As "a red mug" of the objects' prompts and of the textures."""
    rows = ["subject,prompt,path,kind", "mug,a red mug,t.png,texture", "mug,a red mug,any.png,"]
    (tmp_path / "made.csv").write_text("\n".join(rows))
    for name, color in (("t", "red"), ("any", "blue")):
        Image.new("RGB", (2, 2), color).save(tmp_path / f"{name}.png")
    method, reference = Folder(str(tmp_path / "made.csv")), Reference(tmp_path / "00.png")
    method.setup(Models(mini_foundation()), Sampler())
    mug = Subject("mug", "mug", False, [reference.path], None)
    tasks = [PictureTask("mug", "mug", 0, kind, 0, "a red mug", 0, 0) for kind in ("texture", "context")]
    assert [image.getpixel((0, 0)) for image in method.generate(mug, reference, tasks)] == [(255, 0, 0), (0, 0, 255)]


def test_folder_names_what_is_missing(tmp_path):
    config = fake_config(tmp_path, {})
    config.methods["theirs"] = Folder(write_folder(tmp_path / "theirs", Evaluation.open(config), skip=1))
    with pytest.raises(ValueError, match="names no picture number 1 of subject 'tabby'"):
        generate(config)
    Path(tmp_path / "excel.csv").write_text("subject,prompt,path\n", encoding="utf-8-sig")
    assert Folder(str(tmp_path / "excel.csv")).rows() == []
    Path(tmp_path / "bad.csv").write_text("subject,path\n")
    with pytest.raises(ValueError, match="bad.csv lacks the columns prompt"):
        Folder(str(tmp_path / "bad.csv")).rows()
    for row in ("cat,a cat", "cat,a cat,", ",a cat,a.png"):
        Path(tmp_path / "bad.csv").write_text(f"subject,prompt,path\ncat,a cat,a.png\n{row}\n")
        with pytest.raises(ValueError, match="bad.csv, line 3: (path|subject) is empty"):
            Folder(str(tmp_path / "bad.csv")).rows()
    Path(tmp_path / "bad.csv").write_text("subject,prompt,path\ncat,a cat, asleep,a.png\n")
    with pytest.raises(ValueError, match="bad.csv, line 2: more cells than columns"):
        Folder(str(tmp_path / "bad.csv")).rows()
    Path(tmp_path / "bad.csv").write_text("subject,prompt,path\n", encoding="utf-16")
    with pytest.raises(ValueError, match="bad.csv is not UTF-8"):
        Folder(str(tmp_path / "bad.csv")).rows()
