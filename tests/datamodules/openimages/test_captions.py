"""The keyword filter and the label in the caption."""

import pytest
from tiny import tiny_tokenizer

from datamodules.openimages.captions import CaptionError, CaptionRules, article, finish, plural, read_words, tidy
from datamodules.openimages.config import CaptionConfig
from datamodules.openimages.hierarchy import label_of
from datamodules.shards import contains_label
from moma_lightning.subject import label_tokens

RULES = CaptionRules.of(CaptionConfig())


@pytest.mark.parametrize(("before", "label", "after"), [
    ("a black and white cat sitting on a red sofa", "cat", "a cat sitting on a sofa"),
    ("the car is red", "car", "the car"),
    ("a cat dressed in black", "cat", "a cat"),
    ("an orange cat on the beach", "cat", "a cat on the beach"),
    ("a yellow umbrella", "umbrella", "an umbrella"),
    ("a white, fluffy dog, lying on green grass.", "dog", "a dog, lying on grass."),
    ("A Black-and-White photo of a dog", "dog", "A photo of a dog"),
    ("a car with red and white stripes", "car", "a car with stripes"),
    ("a dark red brick wall with a stop sign", "stop sign", "a brick wall with a stop sign"),
    ("a stuffed animal with a pink bow", "stuffed animal", "a stuffed animal with a bow"),
    ("a vase made of glass", "vase", "a vase"),
    ("a redish car near Redmond", "car", "a redish car near Redmond"),  # whole words only
    ("a cat without any", "cat", "a cat without any"),
    ("A CAT", "cat", "A CAT"),
    ("a toy robot's arm", "toy robot", "a toy robot's arm"),
    ("two cats on a sofa", "cat", "photo of a cat. two cats on a sofa"),
    ("a kitten", "cat", "photo of a cat. a kitten"),
    ("red", "apple", "photo of an apple."),
])
def test_listed_words_go_sentences_stay_whole_and_the_label_stands_in_them(before, label, after):
    assert finish(before, label, RULES) == (before, after) and contains_label(after, label)


@pytest.mark.parametrize(("before", "label"), [
    ("an orange on a wooden table", "orange"), ("a brown bear in the woods", "brown bear"), ("a red panda with red fur", "red panda"),
    ("a glass of water", "table"), ("a close up of a rose", "rose"), ("a bowl with an orange", "bowl"),
])
def test_a_label_or_a_thing_of_a_listed_name_stays(before, label):
    word = next(w for w in before.split() if w in RULES.removed)
    assert word in finish(before, label, RULES)[1]


@pytest.mark.parametrize(("before", "label", "after"), [
    ("a brown bear in the woods", "brown bear", "a brown bear in the woods"),
    ("two brown bears", "brown bear", "photo of a brown bear. two brown bears"),
    ("a traffic light red and green", "traffic light", "a traffic light"),  # "light red" is a colour
])
def test_of_a_label_no_word_goes(before, label, after):
    assert finish(before, label, RULES)[1] == after


def test_a_colour_that_is_a_thing_too_goes_with_the_colour_it_is_joined_to():
    assert finish("an orange and white cat on a chair", "cat", RULES)[1] == "a cat on a chair"
    assert finish("the orange and white cats", "cat", RULES)[1] == "photo of a cat. the cats"
    assert finish("a silver and black bus on a road", "bus", RULES)[1] == "a bus on a road"
    assert finish("a table with an orange and green apples", "table", RULES)[1] == "a table with an orange and apples"
    assert finish("a bowl with an orange, green grapes and a knife", "bowl", RULES)[1] == "a bowl with an orange, grapes and a knife"


def test_captions_without_the_label_can_be_left_out():
    with pytest.raises(CaptionError, match="^label_absent$"):
        finish("a kitten", "cat", CaptionRules.of(CaptionConfig(missing_label="drop")))


@pytest.mark.parametrize(("raw", "reason"), [
    (b"a caf\xe9", "caption_not_utf8"), ("", "caption_empty"), (" \x00\n", "caption_empty"), ("\ud800", "caption_not_utf8"),
    ("a man riding a horse", "caption_has_people"), ("People with a dog", "caption_has_people"),
    ("a horse in a woman's hand", "caption_has_people"), ("a child\u2019s horse", "caption_has_people"), ("the boys' horse", "caption_has_people"),
])
def test_unusable_captions_have_a_reason(raw, reason):
    with pytest.raises(CaptionError, match=f"^{reason}$"):
        finish(raw, "horse", RULES)


def test_words_of_people_are_whole_words():
    assert finish("a manatee and a man-made mannequin", "manatee", RULES)[1] == "a manatee and a man-made mannequin"


def test_tidy_gives_one_line():
    assert tidy(b"a  cat\r\n on\tgrass\x07") == "a cat on grass"


@pytest.mark.parametrize(("label", "many"), [("cat", "cats"), ("box", "boxes"), ("butterfly", "butterflies"), ("toy", "toys"),
                                             ("stuffed animal", "stuffed animals"), ("fish", "fish"), ("computer mouse", "computer mice")])
def test_plurals(label, many):
    assert plural(label) == many


def test_articles():
    assert [article(w) for w in ("apple", "unicorn", "hourglass", "cat", "umbrella")] == ["an", "a", "an", "a", "an"]


def test_a_bad_word_list_is_named(tmp_path):
    (tmp_path / "w.txt").write_text("# colours\nred\ndark red\n")
    with pytest.raises(ValueError, match="w.txt.*dark red"):
        read_words(str(tmp_path / "w.txt"))
    with pytest.raises(FileNotFoundError, match="nothing.txt"):
        read_words("nothing.txt")


@pytest.mark.parametrize(("name", "raw", "caption"), [
    ("Stuffed animal", "a red stuffed animal", "a stuffed animal"), ("stuffed animal", "two stuffed animals", "photo of a stuffed animal. two stuffed animals"),
    ("stuffed animal", "a stuffed toy animal", "photo of a stuffed animal. a stuffed toy animal"),
    ("oven mitt", "Oven Mitts", "photo of an oven mitt. Oven Mitts"), ("toy robot", "a toy robot's arm", "a toy robot's arm"),
    ("cat", "a red cat", "a cat"), ("cat", "some cats", "photo of a cat. some cats"), ("cat", "something else", "photo of a cat. something else"),
    ("Bat (Animal)", "a bat in a red cave", "a bat in a cave"), ("Bat (Animal)", "something else", "photo of a bat. something else"),
])
def test_the_labels_tokens_are_found_in_its_caption(name, raw, caption):
    """As training looks for them, in captions that had the label, its plural or neither."""
    label = label_of(name)
    assert finish(raw, label, RULES)[1] == caption
    assert label_tokens([tiny_tokenizer()], [caption], label).sum() > 0


@pytest.mark.parametrize("before", ["a view of the river " * 14, "1234567890 " * 5, "\u732b" * 17 + " ", "- " * 51, "antidisestablishmentarianism " * 13])
def test_a_label_beyond_what_the_text_encoder_reads_is_said_first(before):
    """It would not be found among the caption's tokens, and end the training."""
    full, caption = finish(f"{before}with a cat", "cat", RULES)
    assert full.endswith("with a cat") and caption == f"photo of a cat. {full}"
    assert label_tokens([tiny_tokenizer()], [caption], "cat").sum() > 0
    with pytest.raises(CaptionError, match="^label_absent$"):
        finish(full, "cat", CaptionRules.of(CaptionConfig(missing_label="drop")))


def test_a_label_that_is_just_read_stays_where_it_is():
    assert finish("on " * 49 + "cat", "cat", RULES)[1] == "on " * 49 + "cat"
    assert finish("on " * 49 + "toy robot", "toy robot", RULES)[1] == "photo of a toy robot. " + "on " * 49 + "toy robot"
    assert finish("a cat " + "on " * 99 + "cat", "cat", RULES)[1] == "a cat " + "on " * 99 + "cat"
