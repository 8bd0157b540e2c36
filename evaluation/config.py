"""What `python -m evaluation` reads: one dataclass, filled from experiments/<family>/eval.yaml."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from evaluation.methods import Method, Models, Moma
from evaluation.names import method_name
from evaluation.protocols import Protocol, named
from moma_lightning.foundation import Dtype, FoundationConfig

#: Of summaries and ablations, beside their methods.
RESERVED = ("differences", "title", "made_with", "methods", "published", "sampler")


@dataclass
class AblationConfig:
    """One table of settings, over the same noise as everything else.

    name: of its files under <run>/ablations. methods: in the table's order; one that is named and set as in the main evaluation shares
    its pictures. published: the paper's rows to print beside it.
    """

    name: str | None = None
    title: str = ""
    methods: dict[str, Method] = field(default_factory=dict)
    published: Literal["masking", "beta"] | None = None


@dataclass
class ReportConfig:
    """subjects, prompts: rows of the picture grid. pixels: pictures wider than this are shrunk in the page.

    bases: other fine-tunes of the base model that take the adapters unmodified (Figure 10, lower panel). settings_base: one that knows the words
    of poses and camera distances (upper panel), None for the base itself. Both are folders, files, LoRAs or hub ids.
    """

    title: str = "MoMA evaluation"
    subjects: int = 8
    prompts: int = 3
    pixels: int = 256
    bases: list[str] = field(default_factory=list)
    settings_base: str | None = None


@dataclass
class WandbConfig:
    """Logging of the table and the grid. Without a key (`wandb_mode`) it stays offline. project: None is WANDB_PROJECT, or moma-lightning."""

    enabled: bool = True
    project: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class EvalConfig:
    """An evaluation.

    run: folder that receives eval/, ablations/ and report/. data: folder in google/dreambooth's layout.
    protocol: a preset's name, or a YAML file of a protocol's fields. foundation: the base models. overrides: fields of the protocol to change, nested like
    them, each over what earlier files say of it. methods: name -> method, in the table's order.
    adapter, decoder: what the two stages wrote, None where no method needs them. num_processes: workers, each with its share of the subjects and threads (on
    GPUs, one a device). dtype: of the weights that draw; scoring's are the protocol's. batch_size: pictures a pipeline call; making a
    method's pictures, fewer where a GPU's memory does not hold them.
    ablation: the table that `ablate` makes. moma: the setting that `point` scores, one of a sweep.
    """

    run: str
    data: str
    protocol: str
    foundation: FoundationConfig
    overrides: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)
    adapter: str | None = None
    decoder: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_processes: int = 1
    dtype: Dtype = "float32"
    batch_size: int = 16
    ablation: AblationConfig = field(default_factory=AblationConfig)
    moma: Moma = field(default_factory=Moma)
    report: ReportConfig = field(default_factory=ReportConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_processes < 1:
            raise ValueError(f"batch_size {self.batch_size}, num_processes {self.num_processes}: each has to be 1 at least")
        for name in (*self.methods, *self.ablation.methods):
            if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name) or name in RESERVED:
                raise ValueError(f"a method cannot be called {name!r}: its name is a folder, and {', '.join(RESERVED)} are keys of the summaries")
        if self.ablation.name is not None and not re.fullmatch(r"\w[\w.+-]*", self.ablation.name):
            raise ValueError(f"an ablation cannot be called {self.ablation.name!r}: its name is that of two files")
        for methods in (self.methods, self.ablation.methods):
            keys: dict[str, str] = {}
            for name in methods:
                if (other := keys.setdefault(method_name(name), name)) != name:
                    raise ValueError(f"methods {other!r} and {name!r} would both be called {method_name(name)!r} in tables and figures: rename one")

    @property
    def eval_folder(self) -> Path:
        return Path(self.run) / "eval"

    @property
    def ablations_folder(self) -> Path:
        return Path(self.run) / "ablations"

    @property
    def sweeps_folder(self) -> Path:
        return Path(self.run) / "sweeps"

    @property
    def report_folder(self) -> Path:
        return Path(self.run) / "report"

    @property
    def pictures(self) -> Path:
        return self.eval_folder / "pictures"

    def resolved_protocol(self) -> Protocol:
        return named(self.protocol, self.overrides)

    def resolved_device(self) -> str:
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def processes(self, subjects: int) -> int:
        """How many work at a time: no more than there are subjects and, on GPUs, devices."""
        count = min(self.num_processes, subjects)
        return min(count, torch.cuda.device_count()) if self.resolved_device() == "cuda" else count

    def models(self, device: str = "cpu") -> Models:
        return Models(self.foundation, self.adapter, self.decoder, device, self.dtype)
