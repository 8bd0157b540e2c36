"""A guided denoising step with both adapters and iterative masking, against the same UNet with diffusers' own attention."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from experiments.benchmarks import explicit
from experiments.benchmarks.discs import disc
from experiments.benchmarks.timing import PRECISION, Case, dtype_of
from experiments.mini.models import MINI, mini_foundation
from moma_lightning.foundation import load_base
from moma_lightning.models.adapter import MoMAAdapter, install_processors
from moma_lightning.models.attention import Recorder
from moma_lightning.models.masks import MaskPyramid
from moma_lightning.pipeline import MoMAPipeline
from moma_lightning.subject import Subject, SubjectGuide, SubjectSettings, label_tokens

LABEL, PROMPT, T = "cat", "a cat on the beach", 500
COMPILE = "reduce-overhead"


@dataclass
class Size:
    """A UNet with random weights: Stable Diffusion 1.5's layout with its channels times `width`, or the mini one, on square latents.

    pictures: drawn at once, each a guided and an unguided row of the batch. steps: timed together, where one is too short to time.
    compiled: both UNets are, into CUDA graphs. text_length: tokens of a prompt, as the base's tokenizer fills it up.
    """

    name: str
    latents: int
    width: float | None = None
    pairs: int | None = None
    pictures: int = 1
    steps: int = 1
    compiled: bool = False
    text_length: int = 77

    @property
    def shape(self) -> str:
        unet = f"SD 1.5's UNet x{self.width:g}" if self.width else "mini UNet"
        steps = f", {self.steps} steps" if self.steps > 1 else ""
        compiled = f", compiled ({COMPILE})" if self.compiled else ""
        return f"{unet}, {self.latents}x{self.latents} latents, {self.text_length} tokens, guided batch of {2 * self.pictures}, {PRECISION}{steps}{compiled}"

    def build(self, device: torch.device) -> UNet2DConditionModel:
        with device:
            if self.width is None:
                return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(f"{MINI}/base", subfolder="unet")).eval()
            channels, groups = tuple(int(c * self.width) for c in (320, 640, 1280, 1280)), 32 if self.width == 1 else 16
            return UNet2DConditionModel(block_out_channels=channels, cross_attention_dim=768, attention_head_dim=8, norm_num_groups=groups).eval()


SIZES = [Size("mini", 8, steps=10, text_length=24), Size("sd15", 64, 1.0, pairs=7)]
#: Many minutes a pair on a CPU core, so it is asked for (`--full`). A GPU waits for its next operation with a batch of 2.
FULL = [Size("sd15 16 pictures", 64, 1.0, pictures=16)]
#: For a GPU: each mask and the plain UNet take a minute or more to compile. A graph's steps follow one another without the GPU being waited for.
COMPILED = [replace(size, name=f"{size.name} compiled", compiled=True, steps=10) for size in (SIZES[1], FULL[0])]


class Setting:
    """Everything a step needs; the masks are discs over `share` of the picture, in the reference and in the new picture."""

    @torch.no_grad()
    def __init__(self, unet: UNet2DConditionModel, latents: int, share: float, device: torch.device, pictures: int = 1, text_length: int = 77):
        there, rows = {"device": device, "dtype": dtype_of(device)}, 2 * pictures
        self.unet, self.latents = unet.to(**there), torch.randn(rows, unet.config.in_channels, latents, latents, **there)
        self.text = torch.randn(rows, text_length, unet.config.cross_attention_dim, **there)
        self.mask = disc(share, latents).to(device)
        self.adapter = random_adapter(unet).to(**there)
        install_processors(unet)
        self.reference = self.adapter.reference_features(unet, self.latents[:1], self.text[:1])
        self.context = self.adapter.context_conditioning(torch.randn(rows, self.adapter.image_proj.proj.in_features, **there))
        self.t = torch.tensor(T, device=device)  # as schedulers give it
        pipe = MoMAPipeline.from_base(replace(load_base(mini_foundation()), unet=unet))
        pipe.adapter, pipe.tokenizer.model_max_length = self.adapter, text_length
        picture = self.mask.expand(-1, 3, -1, -1)
        subject = Subject(picture, picture, self.reference, self.mask, (latents, latents), LABEL, self.adapter.variant, unet.dtype)
        tokens, self.made = label_tokens(pipe.tokenizers, [PROMPT] * pictures, LABEL).to(device), {}
        self.guide = SubjectGuide(self.adapter, subject, tokens, 1, True, (latents, latents), SubjectSettings(1.0, 1.0, 0.2, None, False))

    @torch.no_grad()
    def moma(self) -> Tensor:
        """A later step as `MoMAPipeline.__call__` makes it, with the mask's size held: random weights estimate one of any size."""
        recorder = Recorder(label_tokens=self.guide.label_tokens)
        self.guide.generated_mask = self.mask.expand(len(self.latents) // 2, -1, -1, -1)
        conditioning = self.guide.conditioning(T, self.context, recorder)
        conditioning.made = self.made
        noise = self.unet(self.latents, self.t, self.text, cross_attention_kwargs={"conditioning": conditioning}, return_dict=False)[0]
        self.guide.update(recorder)
        return noise

    def plain(self, compiled: bool = False) -> Callable[[], Tensor]:
        """The same UNet (its weights are shared) with diffusers' own attention."""
        unet = sharing(self.unet)
        unet.set_attn_processor(AttnProcessor2_0())
        if compiled:
            unet.compile(mode=COMPILE)
        return torch.no_grad()(lambda: unet(self.latents, self.t, self.text, return_dict=False)[0])

    @torch.no_grad()
    def explicit(self) -> Callable[[], Tensor]:
        """The same step with explicit matrices, from the same parts; `self.given.maps` then holds the label's maps."""
        unet, size = sharing(self.unet), (self.latents.shape[-1],) * 2
        explicit.install(unet)
        m_ref, m_gen = MaskPyramid(self.mask, size), MaskPyramid(self.mask.expand(len(self.latents), -1, -1, -1), size)
        self.given = given = explicit.conditioning(self.adapter, self.reference, self.context, m_ref, m_gen, self.guide.label_tokens)
        return torch.no_grad()(lambda: unet(self.latents, self.t, self.text, cross_attention_kwargs={"explicit": given}, return_dict=False)[0])


def sharing(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy whose parameters are the very same tensors, so that it can have other attention processors."""
    return copy.deepcopy(unet, {id(p): p for p in unet.parameters()})


def random_adapter(unet: UNet2DConditionModel) -> MoMAAdapter:
    """Started as for training, but with lambda away from 0."""
    adapter = MoMAAdapter.for_unet(unet, 1024).eval().requires_grad_(False)
    for layer in adapter.subject.values():
        layer.lambda_.fill_(0.5)
    return adapter


def cases(sizes: list[Size]) -> list[Case]:
    """Against plain attention at three mask sizes, and explicit matrices against plain attention."""
    def against_plain(size: Size, share: float, which: str):
        def prepare(device: torch.device):
            setting = Setting(size.build(device), size.latents, share, device, size.pictures, size.text_length)
            if size.compiled:
                setting.unet.compile(mode=COMPILE)
            ours = setting.explicit() if which == "explicit" else setting.moma
            return tuple(lambda run=run: [run() for _ in range(size.steps)] for run in (ours, setting.plain(size.compiled)))

        return prepare

    goals = {0.25: "<= 1.05", 0.5: "<= 1.10", 1.0: ""}
    listed = []
    for size in sizes:
        for share, goal in goals.items():
            name = f"guided step / plain, {size.name}, mask {share:.0%}"
            listed.append(Case(name, goal, size.shape, against_plain(size, share, "moma"), size.pairs))
        if size.pictures == 1 and not size.compiled:
            name = f"explicit matrices / plain, {size.name}, mask 25%"
            listed.append(Case(name, "", size.shape, against_plain(size, 0.25, "explicit"), size.pairs))
    return listed
