"""`python -m moma_lightning generate`: pictures of a subject, from one picture of it and prompts."""

import re
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image

from moma_lightning.files import write_beside, write_json
from moma_lightning.foundation import Dtype, FoundationConfig
from moma_lightning.pipeline import load_pipeline
from moma_lightning.pipeline_inputs import check_settings
from moma_lightning.subject import SubjectSettings


def generate(
    prompt: str | list[str],
    foundation: FoundationConfig,
    image: str | None = None,
    mask: str | None = None,
    label: str | None = None,
    out: str = "runs/generated",
    adapter: str | None = None,
    decoder: str | None = None,
    beta: float = 1.0,
    mask_strength: float = 1.0,
    guide_subject: bool = False,
    context_scale: float = 1.0,
    prompt_template: str = "{prompt}",
    guidance_scale: float = 7.5,
    num_inference_steps: int = 50,
    num_images_per_prompt: int = 1,
    batch_size: int = 8,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Write pictures of the subject in `image` as PNG files, each with its settings in a JSON file beside it; numbers go on after those that are there.

    Args:
        prompt: What to show, e.g. "a cat on the beach", or a list: '["a cat on the beach", "a cat in the snow"]'. Each names the label.
        foundation: The base models: --config experiments/mini/generate.yaml names mini's, and its adapter and decoder.
        image: The picture of the subject; without it the base model draws the prompts alone.
        mask: The subject's mask (white on black); without it SAM finds the main object.
        label: The word for the subject, e.g. "cat".
        out: Folder for the pictures.
        adapter: Folder of stage 2 (runs/mini/stage2/adapter), or an IP-Adapter file, which draws as an IP-Adapter.
        decoder: Folder of stage 1 (runs/mini/stage1/image_feature_decoder); null: CLIP's embedding of the picture is the context, as IP-Adapter was trained.
        beta: Subject strength (Eq. 3): 1 for new contexts, 0.4 for new textures.
        mask_strength: 1 full masking, 0 none.
        guide_subject: Let guidance amplify the subject too (not the paper's): truer colours, at a beta of about 0.5.
        context_scale: Weight of the image tokens, IP-Adapter's `scale`.
        prompt_template: What the base model reads; the released code's is "photo of a {label}. {prompt}".
        guidance_scale: Classifier-free guidance.
        num_inference_steps: Denoising steps.
        num_images_per_prompt: Pictures a prompt.
        batch_size: Pictures drawn at once; each batch is written before the next one is drawn.
        height: Of the pictures, in pixels; the base's own size where it is not given.
        width: The same.
        seed: Seed of the first picture's noise; the next ones count up.
        device: Where to compute.
        dtype: Of the weights; 16 bits are for GPUs, bfloat16 also for CPUs that have instructions for it.
    """
    if label is None and "{label}" in prompt_template:
        raise ValueError(f"the prompt template {prompt_template!r} asks for a label: give --label, the word for the subject")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    check_settings(len(prompts), num_images_per_prompt, num_inference_steps, guidance_scale)
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: it has to be 1 at least")
    if image is None and (mask is not None or label is not None):
        raise ValueError("--mask and --label are those of a picture: give it as --image")
    if image is not None and None in (adapter, label):
        raise ValueError("--image needs an adapter (--adapter) and a label (--label), the word for its subject")
    SubjectSettings(beta, mask_strength, guide_subject=guide_subject)  # says what is out of its range
    worded = {text: worded_by(prompt_template, text, label) for text in prompts}
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: PyTorch finds no GPU here")
    reference, found, folder = read_picture(image), read_picture(mask), Path(out)
    folder.mkdir(parents=True, exist_ok=True)  # before models are loaded, which takes long
    adapter, decoder = (adapter, decoder) if image else (None, None)
    pipe = load_pipeline(foundation, adapter, decoder, dtype).to(device)
    settings = dict(beta=beta, mask_strength=mask_strength, guide_subject=guide_subject, context_scale=context_scale,
                    guidance_scale=guidance_scale, num_inference_steps=num_inference_steps, height=height, width=width)
    subject = None
    if reference is not None:
        subject = pipe.prepare_subject(reference, found, label, (height or pipe.default_size()) * (width or pipe.default_size()))
    tasks = [(seed + i, text) for i, text in enumerate(text for text in prompts for _ in range(num_images_per_prompt))]
    first = 1 + max((int(number[0]) for path in folder.glob("*.png") if (number := re.match(r"\d+(?=-)", path.name))), default=-1)
    for start in range(0, len(tasks), batch_size):
        part = tasks[start : start + batch_size]
        generators = [torch.Generator("cpu").manual_seed(drawn_from) for drawn_from, _ in part]
        texts = [text for _, text in part]
        images = pipe([worded[text] for text in texts], subject, generator=generators, mllm_prompt=texts, **settings).images
        for place, ((drawn_from, text), picture) in enumerate(zip(part, images, strict=True), first + start):
            path = folder / f"{place:03d}-{words_of(text)}.png"
            write_beside(path, picture.save)
            record = dict(prompt=text, image=image, mask=mask, label=label, seed=drawn_from, adapter=adapter, decoder=decoder, dtype=dtype,
                          prompt_template=prompt_template, **settings, foundation=asdict(foundation))
            write_json(path.with_suffix(".json"), record, indent=2)
            print(path)


def read_picture(path: str | None) -> Image.Image | None:
    """The decoded picture. Raises OSError that names a file that is absent, cut off or no picture."""
    if path is None:
        return None
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"{path} cannot be read as a picture: {error}") from error


def words_of(prompt: str) -> str:
    """What a file is called by: the prompt's letters and digits (of some scripts without their marks), no more than 60."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60]


def worded_by(template: str, prompt: str, label: str | None) -> str:
    """What the base reads. Raises ValueError for a template with other fields than `{prompt}` and `{label}`."""
    try:
        return template.format(prompt=prompt, label=label)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"the prompt template {template!r} may have {{prompt}} and {{label}} in braces, and nothing else") from error
