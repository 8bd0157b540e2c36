import os
from pathlib import Path

import pytest
from PIL import Image

from datamodules.dreambooth import DreamBooth, fill, load_picture, parse_prompt_lists, parse_prompts_and_classes
from datamodules.own_prompts import PROMPTS, TEXTURE_PROMPTS

TEXT = """Classes

subject_name,class
bear_plushie,stuffed animal
dog, dog
absent,toy

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
"a {0} {1} with Peter's [hat]".format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token),
]
"""


@pytest.fixture
def root(tmp_path):
    for name in ("bear_plushie", "dog"):
        folder = tmp_path / "dataset" / name
        folder.mkdir(parents=True)
        for number in (1, 0):
            Image.new("RGB", (6, 4), (number, 0, 0)).save(folder / f"0{number}.jpg")
    (tmp_path / "dataset" / "prompts_and_classes.txt").write_text(TEXT)
    return tmp_path


def test_subjects(root):
    data = DreamBooth(root)
    assert [s.name for s in data.subjects] == ["bear_plushie", "dog"]
    assert [(s.label, s.is_live) for s in data.subjects] == [("stuffed animal", False), ("dog", True)]
    assert [path.name for path in data.subjects[0].images] == ["00.jpg", "01.jpg"] and data.subjects[0].masks is None
    assert data.missing == ["absent"]
    assert DreamBooth(root / "dataset").subjects == data.subjects


def test_a_class_is_live_however_it_is_written(root):
    path = root / "dataset/prompts_and_classes.txt"
    path.write_text(path.read_text().replace("dog, dog", "pet, Dog"))
    (root / "dataset/dog").rename(root / "dataset/pet")
    assert [subject.is_live for subject in DreamBooth(root).subjects] == [False, True]


def test_one_picture_in_two_formats_is_refused(root):
    Image.new("RGB", (6, 4)).save(root / "dataset/dog/00.png")
    with pytest.raises(ValueError, match=r"dog: 00.jpg, 00.png differ in their format alone"):
        _ = DreamBooth(root).subjects


def test_names_may_hold_spaces_and_dots_and_pictures_be_webp(root):
    (root / "dataset/my dog v1.5").mkdir()
    Image.new("RGB", (6, 4)).save(root / "dataset/my dog v1.5/00.webp")
    path = root / "dataset/prompts_and_classes.txt"
    path.write_text(path.read_text().replace("dog, dog", "dog, dog\nmy dog v1.5,dog"))
    found = DreamBooth(root).subjects[-1]
    assert (found.name, found.label, [image.name for image in found.images]) == ("my dog v1.5", "dog", ["00.webp"])


def test_prompts(root):
    data = DreamBooth(root)
    bear, dog = data.subjects
    assert data.prompts(bear) == [
        "a stuffed animal in the jungle", "a stuffed animal with Peter's [hat]", "a cube shaped stuffed animal"]
    assert data.prompts(dog) == ["a dog wearing a red hat"]
    assert fill("{0} {1}, a {0} {1}", "dog") == "dog, a dog"


def test_texture_prompts_from_the_folder_or_ours(root):
    data = DreamBooth(root)
    assert len(set(TEXTURE_PROMPTS)) == 10 and data.prompts_of("texture", data.subjects[1])[0] == "a dog made of wood"
    text = "prompt_list = [\n'a wooden {0} {1}'.format(unique_token, class_token)\n]\n"
    (root / "dataset" / "texture_prompts.txt").write_text(text)
    data = DreamBooth(root)
    assert data.prompts_of("texture", data.subjects[1]) == ["a wooden dog"]


@pytest.mark.parametrize("kind", PROMPTS)
def test_every_kind_has_prompts_of_ours(root, kind):
    data = DreamBooth(root)
    for subject in data.subjects:
        prompts = data.prompts_of(kind, subject)
        assert len(prompts) == len(set(prompts)) >= 8
        assert all(subject.label in prompt and "{" not in prompt and "  " not in prompt for prompt in prompts)


def test_poses_differ_for_live_subjects_and_files_win(root):
    bear, dog = DreamBooth(root).subjects
    assert "a dog sleeping" in DreamBooth(root).prompts_of("pose", dog)
    assert "a stuffed animal upside down" in DreamBooth(root).prompts_of("pose", bear)
    (root / "dataset" / "pose_prompts.txt").write_text("".join(
        f"prompt_list = [\n'a {{0}} {{1}} {pose}'.format(unique_token, class_token)\n]\n" for pose in ("fallen over", "asleep")))
    data = DreamBooth(root)
    assert (data.prompts_of("pose", bear), data.prompts_of("pose", dog)) == (["a stuffed animal fallen over"], ["a dog asleep"])
    assert data.prompts_of("context", dog) == data.prompts(dog)


def test_unknown_kinds_and_too_many_lists_are_refused(root):
    data = DreamBooth(root)
    with pytest.raises(ValueError, match="no 'weather' prompts; the kinds are context, texture, accessory, pose, camera"):
        data.prompts_of("weather", data.subjects[0])
    (root / "dataset" / "camera_prompts.txt").write_text("prompt_list = [\n'a {0} {1}'\n]\n" * 3)
    with pytest.raises(ValueError, match="camera_prompts.txt: expected one prompt_list, or two"):
        data.prompts_of("camera", data.subjects[0])


def test_masks_are_all_or_none(root):
    (root / "masks" / "dog").mkdir(parents=True)
    Image.new("L", (6, 4)).save(root / "masks" / "dog" / "00.png")
    with pytest.raises(FileNotFoundError, match=r"masks/dog lacks \['01.png'\]"):
        _ = DreamBooth(root).subjects
    Image.new("L", (6, 4)).save(root / "masks" / "dog" / "01.png")
    assert [path.name for path in DreamBooth(root).subjects[1].masks] == ["00.png", "01.png"]


def test_pictures_are_turned_as_exif_says_and_bad_ones_named(root):
    exif = Image.Exif()
    exif[0x0112] = 8
    path = root / "dataset" / "dog" / "00.jpg"
    Image.new("RGB", (6, 4)).save(path, exif=exif)
    assert load_picture(path).size == (4, 6)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"dog/00.jpg cannot be read as a picture"):
        load_picture(path)


def test_unknown_folder_warns_and_empty_one_is_an_error(root):
    (root / "dataset" / "someone").mkdir()
    with pytest.warns(UserWarning, match=r"folders \['someone'\] are left out: .* has no line"):
        data = DreamBooth(root)
    for picture in (root / "dataset" / "dog").iterdir():
        picture.unlink()
    with pytest.raises(FileNotFoundError, match="dog has no picture"):
        _ = data.subjects


def test_not_a_dreambooth_folder(tmp_path, root):
    with pytest.raises(FileNotFoundError, match="prompts_and_classes.txt is missing"):
        DreamBooth(tmp_path / "nowhere")


@pytest.mark.parametrize("text, message", [
    ("nothing", "no lines of the form subject_name,class"),
    (TEXT.split("Live Subject")[0], "expected two prompt lists .* found 1"),
    (TEXT.replace("'a {0} {1} in the jungle'", "__import__('os').getcwd()"), "not a list of"),
    (TEXT.replace("(unique_token, class_token)", "(class_token, unique_token)"), "in this order"),
    (TEXT.replace("{1} in the jungle", "in the jungle"), "needs {1}"),
    (TEXT.replace("{1} in the jungle", "{1} in the {2}"), "no fields besides"),
])
def test_malformed_files_are_named(text, message):
    with pytest.raises(ValueError, match=rf"file.txt.*{message}"):
        parse_prompts_and_classes(text, "file.txt")


def test_lists_are_parsed_never_run(tmp_path):
    with pytest.raises(ValueError, match="is not a prompt"):
        parse_prompt_lists(f"prompt_list = [\nopen('{tmp_path / 'x'}', 'w')\n]\n", "f")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("written", [
    "prompt_list = ['a {1} in armour']", "prompt_list = ['a {1} in armour',\n  ]", "prompt_list = [\n'a {1} in armour'] # mine",
    "prompt_list = [ # see [1]\n'a {1} in armour', # and [2]\n],"])
def test_a_list_may_stand_on_one_line(written):
    several = "prompt_list = [\n'a {0} {1}'.format(unique_token, class_token),\n]\n"
    assert parse_prompt_lists(written, "f") == [["a {1} in armour"]]
    assert parse_prompt_lists(f"{several}{written}\n{several}", "f") == [["a {0} {1}"], ["a {1} in armour"], ["a {0} {1}"]]


@pytest.mark.parametrize("written", [
    "prompt_list = 'a {1}'", "prompt_list = [\n'a {1}'\n", "prompt_list = ['a {1}'] + ['b {1}'], 3", "prompt_list = ['a {1}'] 3"])
def test_a_list_that_does_not_end_is_told(written):
    with pytest.raises(ValueError, match="f: "):
        parse_prompt_lists(written, "f")


REAL = os.environ.get("MOMA_DREAMBOOTH")


@pytest.mark.skipif(REAL is None, reason="set MOMA_DREAMBOOTH to a copy of google/dreambooth to read the real pictures")
def test_real_folder():
    data = DreamBooth(Path(REAL))
    assert len(data.table.classes) == 30 and len(data.subjects) + len(data.missing) == 30
    live_names = {name for name, label in data.table.classes.items() if label in ("cat", "dog")}
    assert live_names == {"cat", "cat2", "dog", "dog2", "dog3", "dog5", "dog6", "dog7", "dog8"}
    for subject in data.subjects:
        assert 4 <= len(subject.images) <= 6 and all(load_picture(path).mode == "RGB" for path in subject.images)
        prompts = data.prompts(subject)
        assert len(set(prompts)) == 25 and all(f" {subject.label}" in p and "  " not in p and "{" not in p for p in prompts)
        assert subject.is_live == (subject.name in live_names) == (f"a {subject.label} wearing a santa hat" in prompts)
