"""Eq. 3, context attention and the label map against plain formulas with explicit matrices, written independently."""

import math

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from moma_lightning.models.attention import (
    Conditioning,
    ContextConditioning,
    MoMAAttnProcessor,
    Recorder,
    SubjectConditioning,
)
from moma_lightning.models.masks import MaskPyramid

CHANNELS, HEADS, TEXT = 24, 3, 16


def self_attention():
    torch.manual_seed(0)
    return Attention(CHANNELS, heads=HEADS, dim_head=CHANNELS // HEADS, processor=MoMAAttnProcessor(4)).requires_grad_(False)


def cross_attention():
    torch.manual_seed(1)
    return Attention(CHANNELS, TEXT, heads=HEADS, dim_head=CHANNELS // HEADS, processor=MoMAAttnProcessor(5)).requires_grad_(False)


def explicit(query, key, value, weights=None):
    """Per head and per query: sum_k w_k exp(q.k / sqrt d) v_k / sum_k w_k exp(q.k / sqrt d)."""
    out = torch.zeros_like(query)
    d = CHANNELS // HEADS
    for b in range(len(query)):
        for h in range(HEADS):
            part = slice(h * d, (h + 1) * d)
            scores = torch.exp(query[b, :, part] @ key[b, :, part].T / math.sqrt(d))
            if weights is not None:
                scores = scores * weights[b][None]
            total = scores.sum(1, keepdim=True)
            out[b, :, part] = torch.where(total > 0, scores @ value[b, :, part] / total.clamp(min=1e-30), 0)
    return out


def subject(lambda_=0.8, beta=0.6, batch=2, reference=None, generated=None, strength=1.0, ref_size=(4, 6), size=(4, 6)):
    torch.manual_seed(2)
    key_values = {4: (torch.randn(batch, ref_size[0] * ref_size[1], CHANNELS), torch.randn(batch, ref_size[0] * ref_size[1], CHANNELS))}
    generated = None if generated is None else MaskPyramid(generated, size, strength)
    return SubjectConditioning(key_values, {4: torch.tensor([lambda_])}, MaskPyramid(reference, ref_size, strength), generated, beta)


def random_mask(batch, size, seed=3, soft=False):
    values = torch.rand(batch, 1, *size, generator=torch.Generator().manual_seed(seed))
    return values if soft else (values > 0.6).float()


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("ref_size", [(4, 6), (5, 3)])
def test_equation_3(strength, soft, ref_size):
    attn, x = self_attention(), torch.randn(2, 24, CHANNELS)
    m_ref, m_gen = random_mask(2, ref_size, 3, soft), random_mask(2, (4, 6), 4, soft)
    conditioning = subject(reference=m_ref, generated=m_gen, strength=strength, ref_size=ref_size)
    key, value = conditioning.key_values[4]
    query = x @ attn.to_q.weight.T
    w_ref = 1 - strength * (1 - m_ref.flatten(1))
    w_gen = 1 - strength * (1 - m_gen.flatten(1))
    expected = explicit(query, x @ attn.to_k.weight.T, x @ attn.to_v.weight.T)
    expected = expected + 0.8 * explicit(query, key, value, w_ref) * w_gen[..., None] * 0.6
    expected = expected @ attn.to_out[0].weight.T + attn.to_out[0].bias
    torch.testing.assert_close(attn(x, conditioning=Conditioning(subject=conditioning)), expected, atol=2e-6, rtol=1e-5)


def test_an_empty_mask_adds_nothing_and_leaves_others_alone():
    attn, x = self_attention(), torch.randn(2, 24, CHANNELS)
    m_ref = random_mask(2, (4, 6))
    m_ref[0] = 0
    out = attn(x, conditioning=Conditioning(subject=subject(reference=m_ref)))
    plain = attn(x)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out[0], plain[0])
    assert not torch.allclose(out[1], plain[1])


def test_gradients_with_an_empty_mask_are_finite():
    attn, x = self_attention(), torch.randn(2, 24, CHANNELS)
    conditioning = subject(reference=torch.zeros(2, 1, 4, 6))
    key, value = conditioning.key_values[4]
    key.requires_grad_(), value.requires_grad_()
    attn(x, conditioning=Conditioning(subject=conditioning)).sum().backward()
    assert torch.isfinite(key.grad).all() and torch.isfinite(value.grad).all()


def test_context_attention():
    attn, x, text = cross_attention(), torch.randn(2, 24, CHANNELS), torch.randn(2, 7, TEXT)
    key, value = torch.randn(2, 4, CHANNELS), torch.randn(2, 4, CHANNELS)
    out = attn(x, text, conditioning=Conditioning(context=ContextConditioning({5: (key, value)}, scale=0.3)))
    query = x @ attn.to_q.weight.T
    expected = explicit(query, text @ attn.to_k.weight.T, text @ attn.to_v.weight.T) + 0.3 * explicit(query, key, value)
    torch.testing.assert_close(out, expected @ attn.to_out[0].weight.T + attn.to_out[0].bias, atol=2e-6, rtol=1e-5)


def test_label_map():
    """Head-mean probability of the label's tokens, summed over them, for the conditional (last) rows."""
    attn, x, text = cross_attention(), torch.randn(4, 24, CHANNELS), torch.randn(4, 7, TEXT)
    tokens = torch.zeros(2, 7)
    tokens[0, 2], tokens[1, 3:5] = 1, 1
    recorder = Recorder(label_tokens=tokens)
    attn(x, text, conditioning=Conditioning(recorder=recorder))
    query, key, d = x @ attn.to_q.weight.T, text @ attn.to_k.weight.T, CHANNELS // HEADS
    for row in range(2):
        total = torch.zeros(24)
        for h in range(HEADS):
            part = slice(h * d, (h + 1) * d)
            probability = torch.softmax(query[2 + row, :, part] @ key[2 + row, :, part].T / math.sqrt(d), -1)
            total += (probability * tokens[row]).sum(-1) / HEADS
        torch.testing.assert_close(recorder.label_maps[5][row], total)


def test_without_conditioning_it_is_diffusers_processor_bit_for_bit():
    for attn, text in ((self_attention(), None), (cross_attention(), torch.randn(2, 7, TEXT))):
        x = torch.randn(2, 24, CHANNELS)
        mine = attn(x, text)
        attn.set_processor(AttnProcessor2_0())
        assert torch.equal(mine, attn(x, text))
