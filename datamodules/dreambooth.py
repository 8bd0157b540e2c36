"""The DreamBooth set of google/dreambooth, or any folder of its layout: subjects, pictures, masks and prompts.

    <root>/dataset/<subject>/00.jpg ...
    <root>/dataset/prompts_and_classes.txt
    <root>/dataset/<kind>_prompts.txt           (ours, optional, for the kinds in own_prompts.py: a `prompt_list` as in the file above, or
                                                two where live subjects have others)
    <root>/masks/<subject>/00.png ...           (ours, optional: 255 = subject)
"""

import ast
import re
import string
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from datamodules import pictures
from datamodules.own_prompts import PROMPTS

PROMPTS_FILE = "prompts_and_classes.txt"
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

#: Classes that get the live prompts, which dress and pose their subject: of google/dreambooth's own cat and dog.
LIVE_CLASSES = frozenset((
    "bear", "bird", "cat", "chicken", "cow", "dog", "donkey", "duck", "elephant", "fish", "fox", "giraffe", "goat", "goose", "hamster", "horse", "kitten",
    "lion", "monkey", "owl", "panda", "parrot", "penguin", "pig", "pony", "puppy", "rabbit", "sheep", "squirrel", "tiger", "turtle", "wolf", "zebra",
))


@dataclass(frozen=True)
class Subject:
    """One subject: its folder's name, its class as prompts call it, and its pictures in the order of their names."""

    name: str
    label: str
    is_live: bool
    images: list[Path]
    masks: list[Path] | None


@dataclass(frozen=True)
class PromptsAndClasses:
    """`prompts_and_classes.txt`: class by subject name, and prompts with `{0}` for a unique token and `{1}` for the class."""

    classes: dict[str, str]
    object_prompts: list[str]
    live_prompts: list[str]


class DreamBooth:
    """Reads a root folder, or its `dataset` folder.

    Raises FileNotFoundError or ValueError that name the file and what is wrong with it.

    Subjects of the classes table without a folder are left out and named in `missing` (a part of the set is still a set);
    folders that the table does not know are left out with a warning.
    """

    def __init__(self, root: str | Path):
        root = Path(root)
        self.dataset = root if (root / PROMPTS_FILE).exists() else root / "dataset"
        self.root = self.dataset.parent
        path = self.dataset / PROMPTS_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {root} is not a folder of google/dreambooth's layout")
        self.table = parse_prompts_and_classes(path.read_text(encoding="utf-8-sig"), str(path))
        self.missing = [name for name in self.table.classes if not (self.dataset / name).is_dir()]
        self._warn_of_unknown_folders()

    @cached_property
    def subjects(self) -> list[Subject]:
        """Subjects with pictures, in the order of the classes table."""
        subjects = [self._subject(name, label) for name, label in self.table.classes.items() if name not in self.missing]
        if not subjects:
            raise FileNotFoundError(f"{self.dataset} has no folder of any of the {len(self.missing)} subjects in {PROMPTS_FILE}")
        return subjects

    def prompts(self, subject: Subject) -> list[str]:
        """The context prompts of a subject; the unique token's place closes up ("a cat in the snow")."""
        templates = self.table.live_prompts if subject.is_live else self.table.object_prompts
        return [fill(template, subject.label) for template in templates]

    def prompts_of(self, kind: str, subject: Subject) -> list[str]:
        """A subject's prompts of a kind: "context", or one of `PROMPTS`. Raises ValueError for another."""
        if kind == "context":
            return self.prompts(subject)
        return [fill(template, subject.label) for template in self._templates(kind)[subject.is_live]]

    def _templates(self, kind: str) -> tuple[Sequence[str], Sequence[str]]:
        """For objects and for live subjects: from `<kind>_prompts.txt`, else ours."""
        if kind not in PROMPTS:
            raise ValueError(f"there are no {kind!r} prompts; the kinds are context, {', '.join(PROMPTS)}")
        path = self.dataset / f"{kind}_prompts.txt"
        if not path.exists():
            return PROMPTS[kind]
        lists = parse_prompt_lists(path.read_text(encoding="utf-8-sig"), str(path))
        if len(lists) not in (1, 2):
            raise ValueError(f"{path}: expected one prompt_list, or two (objects, then live subjects), found {len(lists)}")
        return lists[0], lists[-1]

    def _subject(self, name: str, label: str) -> Subject:
        images = sorted(p for p in (self.dataset / name).iterdir() if p.suffix.lower() in PICTURE_SUFFIXES)
        if not images:
            raise FileNotFoundError(f"{self.dataset / name} has no picture ({', '.join(PICTURE_SUFFIXES)})")
        twice = [image.name for image in images if sum(image.stem == other.stem for other in images) > 1]
        if twice:
            raise ValueError(f"{self.dataset / name}: {', '.join(twice)} differ in their format alone and would count as several pictures: "
                             "keep one of each, or rename what is another picture")
        return Subject(name, label, label.lower() in LIVE_CLASSES, images, self._masks(name, images))

    def _masks(self, name: str, images: list[Path]) -> list[Path] | None:
        folder = self.root / "masks" / name
        if not folder.is_dir():
            return None
        masks = [folder / f"{image.stem}.png" for image in images]
        absent = [mask.name for mask in masks if not mask.is_file()]
        if absent:
            raise FileNotFoundError(f"{folder} lacks {absent}: give every picture of {name} a mask, or remove the folder")
        return masks

    def _warn_of_unknown_folders(self) -> None:
        folders = {p.name for p in self.dataset.iterdir() if p.is_dir() and not p.name.startswith(".")}
        unknown = sorted(folders - self.table.classes.keys())
        if unknown:
            why = f"{PROMPTS_FILE} has no line `folder,class` of them, in letters, digits, spaces and ._-"
            warnings.warn(f"{self.dataset}: folders {unknown} are left out: {why}", stacklevel=3)


def load_picture(path: Path) -> Image.Image:
    """A subject's picture in RGB, turned as its EXIF says; ValueError names a file that cannot be read."""
    try:
        return pictures.open_picture(path)
    except pictures.PICTURE_ERRORS as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def load_mask(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """A mask in mode "L", 0 and 255, scaled to its picture's `size` (width, height); ValueError names a file that cannot be read or does not fit."""
    try:
        return pictures.open_mask(path, size)
    except pictures.PICTURE_ERRORS as error:
        raise ValueError(f"{path} cannot be read as a mask: {error}") from error


def fill(template: str, label: str) -> str:
    """Put a class into a prompt template, and nothing in the unique token's place, without doubled spaces."""
    return " ".join(template.format("", label).split())


def parse_prompts_and_classes(text: str, source: str = PROMPTS_FILE) -> PromptsAndClasses:
    """Parse the text of `prompts_and_classes.txt`; ValueError names `source` and what is missing."""
    head, found, prompts = text.partition("prompt_list")
    classes = dict(re.findall(r"^[ \t]*(\w[\w .-]*?)[ \t]*,[ \t]*(\S.*?)[ \t]*$", head, re.MULTILINE))
    classes.pop("subject_name", None)
    if not classes:
        raise ValueError(f"{source}: no lines of the form subject_name,class before the prompts")
    lists = parse_prompt_lists(found + prompts, source)
    if len(lists) != 2:
        raise ValueError(f"{source}: expected two prompt lists (objects, then live subjects), found {len(lists)}")
    return PromptsAndClasses(classes, *lists)


def parse_prompt_lists(text: str, source: str) -> list[list[str]]:
    """Every `prompt_list = [...]` of a text, as templates. The Python in it is parsed, never run."""
    begun = [text[match.end() :] for match in re.finditer(r"^[ \t]*prompt_list\s*=\s*", text, re.MULTILINE)]
    try:
        return [[_template(node) for node in _elements(rest)] for rest in begun]
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: a prompt_list is not a list of '...'.format(unique_token, class_token): {error}") from error


def _elements(rest: str) -> list[ast.expr]:
    """Of the list that a text begins with: it ends at the first bracket that makes Python of it, and its line there."""
    for end in (match.end() for match in re.finditer(r"\]", rest)):
        with suppress(SyntaxError):  # the bracket of a prompt, or of a comment
            body = ast.parse(rest[:end], mode="eval").body
            behind = rest[end:].partition("\n")[0]
            if not isinstance(body, ast.List) or not re.fullmatch(r"[ \t]*,?[ \t]*(#.*)?", behind):
                raise TypeError(f"{ast.unparse(body)}{behind} is not a list")
            return body.elts
    raise ValueError(f"no list begins with {rest[:40]!r}")


def _template(node: ast.expr) -> str:
    """'a {0} {1}'.format(unique_token, class_token), or a bare string, to its text with {0} and {1}."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if [ast.unparse(argument) for argument in node.args] != ["unique_token", "class_token"]:
            raise ValueError(f"{ast.unparse(node)} does not format unique_token and class_token in this order")
        node = node.func.value
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        raise TypeError(f"{ast.unparse(node)} is not a prompt")
    fields = [field for _, field, _, _ in string.Formatter().parse(node.value) if field is not None]
    if "1" not in fields or not {"0", "1"}.issuperset(fields):
        raise ValueError(f"{node.value!r} needs {{1}} for the class, and no fields besides {{0}} and {{1}}")
    return node.value
