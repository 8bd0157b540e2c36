"""A released checkpoint through the whole pipeline, against a plain re-implementation: explicit attention matrices, DDIM by its
formula, masks by hand. Written from the description of the method, with nothing of the pipeline's but what the MLLM's picture goes through
(`preprocess`). Without a mask the subject attention does not act, which is this project's rule where the first step lies below t = 950."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from moma_lightning.__main__ import main
from moma_lightning.checkpoints import load_adapter
from moma_lightning.foundation import load_mllm
from moma_lightning.models.adapter import MoMAAdapter, install_processors
from moma_lightning.models.image_feature_decoder import ImageFeatureDecoder
from moma_lightning.models.preprocess import preprocess
from moma_lightning.pipeline import MoMAPipeline
from tests.tiny import tiny_base

EMBED, HIDDEN, STEPS, GUIDANCE, BETA = 12, 24, 50, 7.5, 0.8
PROMPT, LABEL = "a cat on the beach", "cat"


class PlainProcessor:
    """One attention layer of the released method with explicit matrices; `now` holds what the current pass needs."""

    def __init__(self, index: int, weights: dict, now: dict):
        self.index, self.weights, self.now = index, weights, now

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        now, d = self.now, hidden_states.shape[-1] // attn.heads
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = hidden_states @ attn.to_q.weight.T, text @ attn.to_k.weight.T, text @ attn.to_v.weight.T
        out, probability = self.attention(query, key, value, attn.heads, d)
        layer = {name.split(".", 1)[1]: w for name, w in self.weights.items() if name.split(".")[0] == str(self.index)}
        if encoder_hidden_states is None:
            if now["pass"] == "reference":
                now["kv"][self.index] = (key @ layer["to_k_ip.weight"].T, value @ layer["to_v_ip.weight"].T)
            elif now["t"] < 950 and now["mask"] is not None:
                k, v = (x.expand(len(query), -1, -1) for x in now["kv"][self.index])
                added, _ = self.attention(query, k, v, attn.heads, d, keys=at_layer(now["reference_mask"], k.shape[1]))
                out = out + layer["scale_learnable"] * BETA * added * at_layer(now["mask"], query.shape[1])[0][:, None]
        elif now["pass"] == "generate":
            k, v = now["tokens"] @ layer["to_k_ip.weight"].T, now["tokens"] @ layer["to_v_ip.weight"].T
            added, _ = self.attention(query, k, v, attn.heads, d)
            out = out + (added if now["mask"] is None else added * at_layer(now["mask"], query.shape[1])[0][:, None])
            now["maps"].append(probability[1].mean(0)[:, now["label_tokens"]].sum(-1))  # row 1: the conditional half
        return out @ attn.to_out[0].weight.T + attn.to_out[0].bias

    @staticmethod
    def attention(query, key, value, heads, d, keys=None):
        q, k, v = (x.view(len(x), -1, heads, d).permute(0, 2, 1, 3) for x in (query, key, value))
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(d)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * (1 if keys is None else keys[:, None, None, :])
        probability = weights / weights.sum(-1, keepdim=True)
        return torch.einsum("bhqk,bhkd->bqhd", probability, v).flatten(2), probability


def at_layer(mask, positions):
    """Area average of [h, w] over the layer's grid, flat; the tiny UNet halves once."""
    factor = math.isqrt(mask.numel() // positions)
    return F.avg_pool2d(mask[None, None], factor).flatten(1) if factor > 1 else mask.reshape(1, -1)


def scaled(x):
    return (x - x.min()) / (x.max() - x.min())


def estimated_mask(maps, size):
    """Each layer scaled, brought to the latents' size, averaged, scaled; up to 0.2 is background; scaled again."""
    total = 0
    for one in maps:
        factor = math.isqrt(size[0] * size[1] // len(one))
        grid = scaled(one).view(1, 1, size[0] // factor, size[1] // factor)
        total = total + F.interpolate(grid, size, mode="bilinear")[0, 0]
    mean = scaled(total / len(maps))
    return scaled(torch.where(mean <= 0.2, 0.0, mean))


def ddim(latents, noise, t, alphas):
    previous = alphas[t - 1000 // STEPS] if t >= 1000 // STEPS else alphas[0]
    clean = (latents - (1 - alphas[t]).sqrt() * noise) / alphas[t].sqrt()
    return previous.sqrt() * clean + (1 - previous).sqrt() * noise


@torch.no_grad()
def plain_latents(base, file, mllm, processor, pixels, mask, latents):
    """Latents after the last step, and M_gen of each. pixels in [-1, 1]; mask [h, w] of 0 and 1 at the pixels' size."""
    nested = torch.load(file, weights_only=True)
    now, size = {"pass": "reference", "kv": {}, "mask": None}, latents.shape[-2:]
    base.unet.set_attn_processor({n: PlainProcessor(i, nested["self_cross_attentions"], now) for i, n in enumerate(base.unet.attn_processors)})

    def encode(text):
        ids = base.tokenizer(text, padding="max_length", max_length=base.tokenizer.model_max_length, return_tensors="pt").input_ids
        return ids[0], base.text_encoder(ids).last_hidden_state

    inputs = processor(images=[Image.new("RGB", (16, 16))], text=[
        f"USER: <image>\n A photo of a {LABEL}. Describe a new image of the same {LABEL} in: {PROMPT}. ASSISTANT: *"], return_tensors="pt")
    white, pad = torch.where(mask > 0, pixels, 1.0), abs(pixels.shape[-1] - pixels.shape[-2]) // 2
    white = F.pad(white, (0, 0, pad, pad) if pixels.shape[-1] > pixels.shape[-2] else (pad, pad, 0, 0), value=1.0)
    inputs["pixel_values"] = preprocess(white, processor.image_processor)
    hidden = mllm.model(**inputs).last_hidden_state[0, -1]
    gate, up, down = (nested["llm_mapping"][f"mapping.{n}_proj.weight"] for n in ("gate", "up", "down"))
    embed = down @ (F.silu(gate @ hidden) * (up @ hidden))
    project = nested["projectors"]
    tokens = torch.stack([torch.zeros(EMBED), embed]) @ project["proj.weight"].T + project["proj.bias"]
    now["tokens"] = F.layer_norm(tokens.view(2, 4, -1), (tokens.shape[1] // 4,), project["norm.weight"], project["norm.bias"])

    clean = base.vae.encode(pixels).latent_dist.mean * base.vae.config.scaling_factor
    base.unet(clean, 0, encode(LABEL)[1])
    ids, positive = encode(f"photo of a {LABEL}. {PROMPT}")
    text = torch.cat([encode("")[1], positive])
    now |= {"pass": "generate", "label_tokens": ids == base.tokenizer(LABEL, add_special_tokens=False).input_ids[0],
            "reference_mask": F.adaptive_avg_pool2d(mask, tuple(size))[0]}
    alphas, masks = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0), []
    for t in [(1000 // STEPS) * i + 1 for i in reversed(range(STEPS))]:
        now |= {"t": t, "maps": []}
        without, with_text = base.unet(torch.cat([latents] * 2), t, text).sample.chunk(2)
        latents = ddim(latents, without + GUIDANCE * (with_text - without), t, alphas)
        now["mask"] = estimated_mask(now["maps"], tuple(size))
        masks.append(now["mask"])
    return latents, torch.stack(masks)


@pytest.fixture
def files(tmp_path):
    """A function that makes a released file for a UNet of `heads` heads, and its native folder by `convert`."""

    def make(heads: int):
        base = tiny_base(heads=heads)
        adapter = MoMAAdapter.for_unet(base.unet, EMBED)
        layers = {f"{i}.to_{kv}_ip.weight": getattr(layer, f"to_{kv}").weight for i, layer in adapter.subject.items() for kv in "kv"}
        layers |= {f"{i}.to_{kv}_ip.weight": getattr(layer, f"to_{kv}_ip").weight for i, layer in adapter.context.items() for kv in "kv"}
        layers = {name: value.detach() + 0.2 * torch.randn(value.shape) for name, value in layers.items()}
        layers |= {f"{i}.scale_learnable": torch.rand(1) + 0.5 for i in adapter.subject}
        mapping = {f"mapping.{n}_proj.weight": torch.randn(EMBED, EMBED if n == "down" else HIDDEN) / 4 for n in ("gate", "up", "down")}
        torch.save({"projectors": adapter.image_proj.state_dict(), "self_cross_attentions": layers, "llm_mapping": mapping}, tmp_path / "released.th")
        assert main(["convert", "--from", str(tmp_path / "released.th"), "--to", str(tmp_path / "native")]) == 0
        return tmp_path / "released.th", tmp_path / "native"

    return make


@pytest.mark.parametrize("width, height, heads", [(64, 64, 4), (96, 48, 2)])
def test_a_released_checkpoint_samples_as_described(files, tiny_foundation, width, height, heads):
    file, native = files(heads)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))
    grey = rng.integers(0, 100, (height, width), np.uint8)  # JPEG noise in the background
    grey[height // 4 : height // 2, width // 3 : width // 2] = rng.integers(140, 255, (height // 2 - height // 4, width // 2 - width // 3))
    latents = torch.randn(1, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(1))

    base = tiny_base(heads=heads)
    pixels = torch.from_numpy(np.asarray(picture, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    mllm, processor = load_mllm(tiny_foundation)
    expected, masks = plain_latents(base, file, mllm, processor, pixels, torch.from_numpy(grey > 127).float()[None], latents)

    install_processors(base.unet)
    decoder = ImageFeatureDecoder.from_pretrained(native / "image_feature_decoder", tiny_foundation)
    pipe = MoMAPipeline.from_base(base, load_adapter(native / "adapter", base.unet).eval(), decoder)
    output = pipe(f"photo of a {LABEL}. {PROMPT}", picture, Image.fromarray(grey), LABEL, mllm_prompt=PROMPT, beta=BETA, guidance_scale=GUIDANCE,
                  num_inference_steps=STEPS, latents=latents, output_type="latent", return_masks=True, height=height, width=width)
    torch.testing.assert_close(output.masks[:, 0, 0], masks, atol=2e-3, rtol=1e-2)
    torch.testing.assert_close(output.images, expected, atol=2e-3 * float(expected.abs().max()), rtol=1e-2)
