import copy
from dataclasses import fields, is_dataclass, replace

import pytest

from datamodules.dreambooth import DreamBooth
from evaluation.protocols import PRESETS, Sampler, named
from evaluation.tasks import choose, chosen_subjects, picture_seed, tasks_of
from experiments.mini.models import FULL_PROTOCOL, PROTOCOL
from tests.evaluation.fakes import PROMPTS, write_data

MINI = named(PROTOCOL)


@pytest.fixture
def data(tmp_path) -> DreamBooth:
    return DreamBooth(write_data(tmp_path))


def leaves(value, path=()):
    for field in fields(value):
        inner = getattr(value, field.name)
        yield from leaves(inner, (*path, field.name)) if is_dataclass(inner) else [(*path, field.name)]


def with_another(value, path):
    """A copy that differs in one field, whose new value need not make sense."""
    copied, (name, *rest) = copy.copy(value), path
    object.__setattr__(copied, name, with_another(getattr(value, name), rest) if rest else f"not {getattr(value, name)}")
    return copied


@pytest.mark.parametrize("path", list(leaves(MINI)), ids=".".join)
def test_every_field_moves_the_digest(path):
    assert with_another(MINI, path).digest != MINI.digest == replace(MINI).digest


def test_presets_say_what_they_are_named_after():
    assert {name: preset.name for name, preset in PRESETS.items()} == {name: name for name in PRESETS}
    paper, dreambooth = PRESETS["moma-paper"], PRESETS["dreambooth"]
    assert (paper.references, dreambooth.references, paper.pictures_per_prompt) == ("every", "first", 4)
    assert (dreambooth.dino.model, dreambooth.dino.resize, dreambooth.dino.crop) == ("vit_small_patch16_224.dino", 256, 224)
    assert (dreambooth.clip.model, dreambooth.clip_t_scale, dreambooth.text_template) == ("openai/clip-vit-base-patch32", 1.0, "{prompt}")
    assert (dreambooth.comparison, dreambooth.aggregation, dreambooth.mask_background) == ("all", "pictures", "white")
    assert dreambooth.sampler == paper.sampler == Sampler("DDIMScheduler", 50, 7.5, beta=1.0, mask_strength=1.0, seed=0, masks="sam")


def test_overrides_reach_nested_fields_and_rename():
    protocol = named(PROTOCOL, {"pictures_per_prompt": 2, "sampler": {"num_inference_steps": 5}})
    assert protocol.sampler == replace(MINI.sampler, num_inference_steps=5)
    assert (protocol.name, protocol.pictures_per_prompt) == ("dreambooth-mini, modified", 2)
    assert named(PROTOCOL, {"pictures_per_prompt": 1}) == MINI


@pytest.mark.parametrize("overrides", [{"stepz": 3}, {"sampler": {"stepz": 3}}, {"pictures_per_prompt": "many"}])
def test_wrong_overrides_are_refused(overrides):
    with pytest.raises(ValueError, match="protocol overrides"):
        named(PROTOCOL, overrides)


@pytest.mark.parametrize(("overrides", "told"), [
    ({"context_prompts": -1}, "0 or more"), ({"pictures_per_prompt": 0}, "1 or more"), ({"context_prompts": 0, "texture_prompts": 0}, "no prompt of any kind"),
    ({"subjects": []}, "names no subject"),
    ({"subjects": ["tabby", "tabby"]}, "a subject twice"), ({"text_template": "A photo depicts"}, "has to have {prompt}, and"),
    ({"sampler": {"num_inference_steps": 0}}, "at least 1"), ({"text_template": "{prompt}, {label}"}, "nothing else in braces"),
    ({"sampler": {"prompt_template": "a photo"}}, "{prompt} and may have {label}")])
def test_protocols_that_score_something_else_are_refused(overrides, told):
    with pytest.raises(ValueError, match=told):
        named(PROTOCOL, overrides)


@pytest.mark.parametrize("encoder", ["clip", "siglip2"])
def test_a_pinned_revision_is_of_its_own_model_alone(encoder, tmp_path):
    """Whoever overrides the model says its revision too: another repository has no such commit."""
    pinned = getattr(PRESETS["dreambooth"], encoder)
    with pytest.raises(ValueError, match=f"owner/other: revision {pinned.revision} is pinned for {pinned.model}"):
        named("dreambooth", {encoder: {"model": "owner/other"}})
    for revision in (None, "abc"):
        assert getattr(named("dreambooth", {encoder: {"model": "owner/other", "revision": revision}}), encoder).revision == revision
    assert getattr(named("dreambooth", {encoder: {"model": str(tmp_path)}}), encoder).model == str(tmp_path)  # a folder has no revisions


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="dreambooth, moma-paper, dreambooth-all-refs"):
        named("dreambench")


def test_counts_of_the_work_list(data):
    subject = data.subjects[0]
    every = named("moma-paper", {"pictures_per_prompt": 2})
    tasks = list(tasks_of(every, data, subject))
    assert len(tasks) == 3 * (5 + 10) * 2
    assert len({task.file for task in tasks}) == len(tasks)
    mini = list(tasks_of(named(PROTOCOL, {"context_prompts": 3, "texture_prompts": 2}), data, subject))
    assert [t.kind for t in mini] == ["context"] * 3 + ["texture"] * 2
    assert {t.reference for t in mini} == {0}


def test_noise_is_shared_by_references_and_differs_otherwise(data):
    tasks = list(tasks_of(named("moma-paper"), data, data.subjects[0]))
    seeds = {(t.kind, t.prompt_index, t.picture): set() for t in tasks}
    for task in tasks:
        seeds[task.kind, task.prompt_index, task.picture].add(task.seed)
    assert all(len(found) == 1 for found in seeds.values())
    assert len(set.union(*seeds.values())) == len(seeds)
    others = tasks_of(named("moma-paper", {"sampler": {"seed": 1}}), data, data.subjects[0])
    assert not {task.seed for task in others} & set.union(*seeds.values())


def test_seeds_never_change():
    """A changed hash would quietly unpair every comparison with pictures made before."""
    assert picture_seed(0, "red_mug", "context", 3, 1) == 157421164389221
    assert 0 <= picture_seed(1, "", "", 0, 0) < 2**48


def test_prompt_choice_is_fixed_spread_and_in_order():
    chosen = {name: choose(PROMPTS, 2, name) for name in map(str, range(12))}
    assert chosen == {name: choose(PROMPTS, 2, name) for name in map(str, range(12))}
    assert {index for found in chosen.values() for index, _ in found} == set(range(5))
    assert all(found == sorted(found) and len(found) == 2 for found in chosen.values())
    assert choose(PROMPTS, None, "a") == list(enumerate(PROMPTS)) == choose(PROMPTS, 99, "a")


def test_unknown_subjects_are_refused(data):
    with pytest.raises(ValueError, match="unicorn"):
        chosen_subjects(named(PROTOCOL, {"subjects": ["tabby", "unicorn"]}), data)
    assert [s.name for s in chosen_subjects(named(PROTOCOL, {"subjects": ["tabby"]}), data)] == ["tabby"]


def test_a_subject_with_one_picture_cannot_be_compared_to_its_others(tmp_path):
    data = DreamBooth(write_data(tmp_path / "alone", pictures=1))
    with pytest.raises(ValueError, match="these have one alone: .*red_mug"):
        chosen_subjects(named("dreambooth-all-refs"), data)
    assert len(chosen_subjects(named("dreambooth"), data)) == 3


def test_a_list_of_references_is_kept_to_and_checked(data):
    protocol = named(PROTOCOL, {"subjects": ["tabby"], "references": ["tabby/02.png", "tabby/00.png"]})
    subject = chosen_subjects(protocol, data)[0]
    assert [image.name for image in subject.images] == ["00.png", "01.png", "02.png"]
    assert list(dict.fromkeys(task.reference for task in tasks_of(protocol, data, subject))) == [2, 0]
    for listed, told in ([["tabby/09.png"], "09.png"], [["other/00.png"], "nothing"], [["tabby/00.png"] * 2, "00.png, 00.png"]):
        with pytest.raises(ValueError, match=rf"lists as references of 'tabby': {told}; its pictures are 00.png, 01.png"):
            list(tasks_of(named(PROTOCOL, {"references": listed}), data, subject))


def test_sampler_defaults_are_the_papers_first_row():
    assert (Sampler().beta, Sampler().mask_strength) == (1.0, 1.0)


def test_each_published_way_of_comparing_is_a_preset():
    references = {name: preset.references for name, preset in PRESETS.items()}
    assert references == {"dreambooth": "first", "moma-paper": "every", "dreambooth-all-refs": "every", "kosmosg-single-ref": "first"}
    assert PRESETS["kosmosg-single-ref"].comparison == "input"
    assert PRESETS["dreambooth-all-refs"].comparison == "others"
    assert len({preset.digest for preset in PRESETS.values()}) == len(PRESETS)


def test_mini_keeps_what_its_pictures_depend_on():
    assert MINI.sampler == Sampler("UniPCMultistepScheduler", num_inference_steps=8, guidance_scale=3.0, masks="dataset")
    assert (MINI.pictures_per_prompt, MINI.context_prompts, MINI.texture_prompts) == (1, 8, 4)
    assert replace(named(FULL_PROTOCOL), name="dreambooth-mini", context_prompts=8, texture_prompts=4) == MINI
    assert (MINI.digest, named(FULL_PROTOCOL).digest) == ("8ff8679e0518", "107b95c6d9aa"), "scores of other digests share no table"


@pytest.mark.parametrize(("text", "told"), [
    (None, "cannot be read"), ("name: dreambooth", "a name of its own"), ("pictures_per_prompt: 1", "a name of its own"), ("[1, 2]", "a name of its own"),
    ("name: mine\nstepz: 1", "stepz"), ("name: mine\nsampler: {num_inference_steps: 0}", "at least 1"), ("name: [", "cannot be read"),
])
def test_a_protocol_file_that_is_none_is_named(tmp_path, text, told):
    path = tmp_path / "protocol.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=told) as raised:
        named(str(path))
    assert str(path) in str(raised.value)


def test_a_protocol_of_ones_own_is_its_fields_over_the_papers(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\npictures_per_prompt: 2\nsampler: {seed: 7}\n")
    assert named(str(path)) == replace(PRESETS["dreambooth"], name="mine", pictures_per_prompt=2, sampler=Sampler(seed=7))
    assert named(str(path), {"pictures_per_prompt": 3}).name == "mine, modified"


def test_full_size_counts_are_the_papers(tmp_path):
    """25 prompts x 4 pictures a reference, on a folder of 3 subjects x 3 pictures with 5 prompts each."""
    data = DreamBooth(write_data(tmp_path))

    def count(name: str) -> int:
        return sum(task.kind == "context" for subject in data.subjects for task in tasks_of(PRESETS[name], data, subject))

    assert count("dreambooth") == count("kosmosg-single-ref") == 3 * 5 * 4
    assert count("moma-paper") == count("dreambooth-all-refs") == 9 * 5 * 4
    assert not any(task.kind != "context" for task in tasks_of(PRESETS["dreambooth-all-refs"], data, data.subjects[0]))


def test_only_encoders_that_are_needed_are_named():
    assert list(MINI.encoders) == ["dino", "clip"]
    protocol = named("dreambooth", {"extra_scores": ["siglip2_t", "dinov3", "dino_masked"]})
    assert list(protocol.encoders) == ["dino", "clip", "dinov3", "siglip2"]
    assert protocol.encoders["dinov3"].model == "vit_small_patch16_dinov3.lvd1689m"
    with pytest.raises(ValueError, match="extra_scores"):
        named(PROTOCOL, {"extra_scores": ["dinov9"]})
    with pytest.raises(ValueError, match="diversity is between a prompt's pictures, and pictures_per_prompt is 1"):
        named(PROTOCOL, {"extra_scores": ["diversity"]})


def test_every_kind_of_prompt_is_asked_for_by_its_count(data):
    asked = {"context_prompts": 1, "texture_prompts": 0, "accessory_prompts": 2, "pose_prompts": 3, "camera_prompts": None}
    tasks = list(tasks_of(named(PROTOCOL, asked), data, data.subjects[2]))
    assert list(dict.fromkeys(task.kind for task in tasks)) == ["context", "accessory", "pose", "camera"]
    assert [sum(task.kind == kind for task in tasks) for kind in ("accessory", "pose", "camera")] == [2, 3, 8]
    assert len({task.file for task in tasks}) == len({task.seed for task in tasks}) == len(tasks)
