"""Every option of the data factory. A default is the paper's choice where the comment says so, else ours: the paper is silent."""

from dataclasses import dataclass, field
from typing import Any, Literal

from datamodules.pictures import MASK_TOLERANCE

Split = Literal["train", "validation", "test"]


@dataclass
class FetchConfig:
    """How files come over HTTPS. timeout, backoff and max_backoff in seconds; the wait doubles with each of the `retries`.

    threads: downloads at a time in each process. on_unreachable: a server that keeps failing after all retries stops the run
    ("raise": run again later, what is there is kept), or its pictures and masks are counted as unreachable ("skip"). One that does
    not exist is always counted; a whole mask zip that does not exist stops the run.
    """

    timeout: float = 60.0
    retries: int = 6
    backoff: float = 0.5
    max_backoff: float = 60.0
    threads: int = 16
    on_unreachable: Literal["raise", "skip"] = "raise"


@dataclass
class SourcesConfig:
    """Where OpenImages V7 is. A base is a URL or a local folder of the same layout; `{split}` and `{digit}` are filled in.

    annotations: base of CSVs, hierarchy and mask zips. pictures: base of `<split>/<ImageID>.jpg`, or a local folder with or
        without the split's own folder, or a glob of tars (not compressed: they are read in place).
    boxes, metadata: None is the split's own name (training's differs). image_labels: the boxable classes' file holds every class
        of the hierarchy and is a tenth of V7's whole `v7/oidv7-train-annotations-human-imagelabels.csv`, which can be named too.
    captions: a CSV or Parquet of `ImageID,caption` instead of captioning here.
    download_mask_zips: fetch the split's 16 zips whole (for all of a split), or read only the wanted members by HTTP ranges.
    checksum: pictures as long as the metadata's OriginalSize must have its MD5. The bucket's copies are mostly scaled down, so of
        another length: for those the server's own MD5 (ETag or x-goog-hash) is compared. "original" refuses them instead.
    """

    annotations: str = "https://storage.googleapis.com/openimages"
    pictures: str = "https://open-images-dataset.s3.amazonaws.com"
    masks: str = "v5/{split}-annotations-object-segmentation.csv"
    boxes: str | None = None
    image_labels: str = "v5/{split}-annotations-human-imagelabels-boxable.csv"
    metadata: str | None = None
    classes: str = "v7/oidv7-class-descriptions-boxable.csv"
    hierarchy: str = "2018_04/bbox_labels_600_hierarchy.json"
    mask_zip: str = "v5/{split}-masks/{split}-masks-{digit}.zip"
    captions: str | None = None
    download_mask_zips: bool = False
    checksum: Literal["either", "original", "off"] = "either"
    fetch: FetchConfig = field(default_factory=FetchConfig)


@dataclass
class SelectConfig:
    """Which masks become subjects. Shares are of the picture's area unless said otherwise.

    humans: the paper removes human-related subjects. "picture" leaves out every picture in which a mask, box or image-level label
        is one of the human classes; "subject" only such masks; "keep" none.
    human_roots: classes that are human with all their subcategories and parts (Person, Human body). more_human_classes: single ones.
    min_label_confidence: image-level labels below it (0 means verified as absent) do not count.
    group_of, depiction, inside: boxes flagged so are left out unless True. require_box: masks without a box within `box_tolerance`
        (of picture sides) are left out; a mask's flags are its box's.
    min_predicted_iou: of the annotators' tool; masks without the number (validation, test) pass.
    max_border: share of the picture's outline that the subject may cover.
    mask_tolerance: a mask whose width to height differs from its picture's by this share or more is left out.
    subjects_per_picture: the largest so many; one, so that a picture's two captions never name each other's subject.
    near_duplicate_bits: pictures whose 64-bit perceptual hashes differ in at most so many are one picture; None: all stay.
    """

    humans: Literal["picture", "subject", "keep"] = "picture"
    human_roots: list[str] = field(default_factory=lambda: ["/m/01g317", "/m/02p0tk3"])
    more_human_classes: list[str] = field(default_factory=list)
    min_label_confidence: float = 0.5
    group_of: bool = False
    depiction: bool = False
    inside: bool = False
    require_box: bool = True
    box_tolerance: float = 0.005
    min_predicted_iou: float = 0.7
    min_area: float = 0.04
    max_area: float = 0.7
    max_border: float = 0.25
    mask_tolerance: float = MASK_TOLERANCE
    subjects_per_picture: int = 1
    classes: list[str] | None = None
    exclude_classes: list[str] = field(default_factory=list)
    min_side: int = 256
    max_pixels: int = 100_000_000
    near_duplicate_bits: int | None = 3

    def __post_init__(self):
        if self.near_duplicate_bits is not None and not 0 <= self.near_duplicate_bits < 64:
            raise ValueError(f"select.near_duplicate_bits is {self.near_duplicate_bits}: hashes have 64 bits, of which 0 to 63 may differ (null: all stay)")


@dataclass
class CaptionConfig:
    """How pictures get their captions, and what captions lose.

    captioner: class path; the default is the paper's BLIP-2 (OPT-6.7B). init_args: its arguments. batch_size: pictures at a time.
    word_lists: files of words that are removed (the paper: colour, shape and texture), one a line; names without a slash are ours.
    people_words: a file of words; captions with one of them are left out, as annotators miss people. None: not looked for.
    missing_label: captions without the label get `label_sentence` before them, which is how the released code words its
        prompts, or are left out ("drop").
    """

    captioner: str = "datamodules.openimages.captioners.Blip2Captioner"
    init_args: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 32
    word_lists: list[str] = field(default_factory=lambda: ["colors.txt", "shapes.txt", "textures.txt"])
    people_words: str | None = "people.txt"
    missing_label: Literal["insert", "drop"] = "insert"
    label_sentence: str = "photo of {a_label}."


@dataclass
class ShardConfig:
    """samples_per_shard: at most; shards of a split differ by one sample. max_side: longer pictures are scaled down (the bucket's
    longest are 1024). quality: of pictures that had to be encoded anew."""

    samples_per_shard: int = 1000
    max_side: int = 1024
    quality: int = 95

    def __post_init__(self):
        if self.samples_per_shard < 1:
            raise ValueError(f"shards.samples_per_shard is {self.samples_per_shard}: it has to be 1 or more")


@dataclass
class RunConfig:
    """How the work is spread; nothing here but `overwrite` changes what is written (and batches of a captioner that rounds differ with `unit`).

    unit: pictures that are finished or not as one.
    address: an existing Ray cluster ("auto", "ray://host:10001"), all of whose cores are used; None starts Ray here. workers: of Ray
        here (None: every core); 0 works in this process, without Ray. captioners: captioning processes; gpus_each: GPUs of each (None: one each
        where Ray has GPUs, else none). keep_work: keep the intermediate folder, from which a larger limit goes on. overwrite: replace the
        finished split of other options (what of its work still holds is used), instead of a ValueError.
    """

    address: str | None = None
    workers: int | None = None
    captioners: int = 1
    gpus_each: float | None = None
    keep_work: bool = True
    unit: int = 256
    overwrite: bool = False
