"""Eq. 3, context attention and the label map against plain formulas with explicit matrices, written independently."""

import math

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from moma_lightning.models import attention, kernels
from moma_lightning.models.adapter import SubjectAttention, subject_keys
from moma_lightning.models.attention import (
    Conditioning,
    ContextConditioning,
    MoMAAttnProcessor,
    Recorder,
    SubjectConditioning,
)
from moma_lightning.models.masks import MaskPyramid

CHANNELS, HEADS, TEXT = 24, 3, 16

@pytest.fixture
def few_queries(request, monkeypatch):
    """0: queries are picked out by their weight. 256: all are computed, as in sampling where they are few."""
    monkeypatch.setattr(attention, "FEW_QUERIES", request.param)
    with torch.set_grad_enabled(not request.param):
        yield


def both_ways(test):
    of_few = pytest.mark.parametrize("few_queries", [0, 256], indirect=True, ids=["picked out", "all computed"])
    return pytest.mark.usefixtures("few_queries")(of_few(test))


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


def reference(batch=2, size=(4, 6)):
    """K' and V' at every position of the reference."""
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(batch, size[0] * size[1], CHANNELS, generator=generator) for _ in range(2))


def subject(key_value, m_ref, m_gen=None, *, lambda_=0.8, beta=0.6, strength=1.0, size=(4, 6)):
    """What the layer is given of `reference()`: W'_k and W'_v are the identity here."""
    layer = SubjectAttention(CHANNELS).requires_grad_(False)
    layer.lambda_.fill_(lambda_)
    keys = subject_keys(layer, *key_value, MaskPyramid(m_ref, m_ref.shape[-2:], strength))
    return SubjectConditioning({4: keys}, None if m_gen is None else MaskPyramid(m_gen, size, strength), beta)


def random_mask(batch, size, seed=3, soft=False):
    values = torch.rand(batch, 1, *size, generator=torch.Generator().manual_seed(seed))
    return values if soft else (values > 0.6).float()


def equation_3(attn, x, key_value, w_ref, w_gen, factor):
    """The whole layer by Eq. 3, every query against every key; factor: lambda * beta, a number or one a row [batch, 1, 1]."""
    query = x @ attn.to_q.weight.T
    expected = explicit(query, x @ attn.to_k.weight.T, x @ attn.to_v.weight.T)
    expected = expected + factor * explicit(query, *key_value, w_ref) * w_gen[..., None]
    return expected @ attn.to_out[0].weight.T + attn.to_out[0].bias


def run(attn, x, conditioning):
    return attn(x, conditioning=Conditioning(subject=conditioning))


@both_ways
@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("ref_size", [(4, 6), (5, 3)])
def test_equation_3(strength, soft, ref_size):
    attn, x, key_value = self_attention(), torch.randn(2, 24, CHANNELS), reference(size=ref_size)
    m_ref, m_gen = random_mask(2, ref_size, 3, soft), random_mask(2, (4, 6), 4, soft)
    w_ref, w_gen = (1 - strength * (1 - m.flatten(1)) for m in (m_ref, m_gen))
    expected = equation_3(attn, x, key_value, w_ref, w_gen, 0.8 * 0.6)
    torch.testing.assert_close(run(attn, x, subject(key_value, m_ref, m_gen, strength=strength)), expected, atol=2e-6, rtol=1e-5)


#: Cells of a 4 x 6 mask by name.
CELLS = {"empty": [], "one": [9], "full": list(range(24)), "some": [0, 1, 7, 8, 13, 23]}


def named_masks(names):
    mask = torch.zeros(len(names), 24)
    for row, name in enumerate(names):
        mask[row, CELLS[name]] = 1
    return mask.view(-1, 1, 4, 6)


@pytest.fixture(params=["operations", "kernels"])
def way(request, monkeypatch):
    """By PyTorch's operations, and by the kernels of a GPU, which Triton's interpreter runs where there is none (gpu/test_sampling.py where there is)."""
    if request.param == "operations":
        yield
        return
    if kernels.triton is None or torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setattr(kernels, "fit", lambda *_: True)
    with torch.no_grad():
        yield


@both_ways
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("generated", CELLS)
@pytest.mark.parametrize("kept", CELLS)
def test_one_subject_for_all_rows_under_any_mask(kept, generated):
    """As in sampling: rows of differing M_gen and beta, one of them 0, share one subject."""
    attn, x, key_value = self_attention(), torch.randn(3, 24, CHANNELS), reference(batch=1)
    m_ref, m_gen, beta = named_masks([kept]), named_masks([generated, "some", "full"]), torch.tensor([[0.6], [1.2], [0.0]])
    every = [x.expand(3, -1, -1) for x in key_value]
    expected = equation_3(attn, x, every, m_ref.flatten(1).expand(3, -1), m_gen.flatten(1), 0.8 * beta[..., None])
    torch.testing.assert_close(run(attn, x, subject(key_value, m_ref, m_gen, beta=beta)), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.usefixtures("way")
def test_one_subject_for_all_rows_under_soft_masks():
    attn, x, key_value = self_attention(), torch.randn(2, 24, CHANNELS), reference(batch=1)
    m_ref, m_gen = random_mask(1, (4, 6), 3, soft=True), random_mask(2, (4, 6), 4, soft=True)
    expected = equation_3(attn, x, [each.expand(2, -1, -1) for each in key_value], m_ref.flatten(1).expand(2, -1), m_gen.flatten(1), 0.8 * 0.6)
    torch.testing.assert_close(run(attn, x, subject(key_value, m_ref, m_gen)), expected, atol=2e-6, rtol=1e-5)


@both_ways
def test_a_subject_a_row_under_differing_masks():
    """As in training: rows keep different numbers of keys and queries, from none to all."""
    attn, x, key_value = self_attention(), torch.randn(4, 24, CHANNELS), reference(batch=4)
    mask = named_masks(["some", "empty", "full", "one"])
    expected = equation_3(attn, x, key_value, mask.flatten(1), mask.flatten(1), 0.8 * 0.6)
    torch.testing.assert_close(run(attn, x, subject(key_value, mask, mask)), expected, atol=2e-6, rtol=1e-5)


def test_the_sum_is_in_place_only_without_gradients():
    attn, x, mask = self_attention(), torch.randn(2, 24, CHANNELS), named_masks(["some", "one"])
    query, given = attn.to_q(x), subject(reference(), mask, mask)
    keys = given.keys[4].split(HEADS, torch.float32)
    with torch.no_grad():
        output = torch.randn(2, 24, CHANNELS)
        before = output.clone()
        kept = attention.add_subject_attention(before, given, query, *keys)
    added = attention.add_subject_attention(output, given, query, *keys)
    assert torch.equal(added, kept) and torch.equal(before, kept) and not torch.equal(output, kept)


def test_gradients_are_those_of_the_plain_formula():
    attn, x, mask = self_attention(), torch.randn(4, 24, CHANNELS), named_masks(["some", "empty", "full", "one"])
    grads, direction = [], torch.randn(4, 24, CHANNELS)
    for kept_only in (True, False):
        key_value = [t.requires_grad_() for t in reference(batch=4)]
        asked = x.clone().requires_grad_()
        out = run(attn, asked, subject(key_value, mask, mask)) if kept_only else equation_3(attn, asked, key_value, *2 * [mask.flatten(1)], 0.48)
        grads.append(torch.autograd.grad((out * direction).sum(), [asked, *key_value]))
    for mine, plain in zip(*grads, strict=True):
        torch.testing.assert_close(mine, plain, atol=5e-6, rtol=1e-5)


def test_only_kept_queries_and_keys_are_computed(monkeypatch):
    attn, key_value = self_attention(), reference(batch=1)
    shapes, plain = [], attention.attend
    monkeypatch.setattr(attention, "attend", lambda q, k, *rest: shapes.append((q.shape[0], q.shape[2], k.shape[2])) or plain(q, k, *rest))
    run(attn, torch.randn(2, 24, CHANNELS), subject(key_value, named_masks(["some"]), named_masks(["one", "some"])))
    assert shapes == [(2, 24, 24), (1, 1 + 6, 6)]


def test_queries_of_all_resolutions_are_found_in_the_first_layer(monkeypatch):
    keys, found, find = subject(reference(batch=1), named_masks(["some"]), named_masks(["one", "some"])), [], SubjectConditioning._find
    monkeypatch.setattr(SubjectConditioning, "_find", lambda self, rows, positions, *rest: found.append(positions) or find(self, rows, positions, *rest))
    keys.resolutions = {24, 6}
    for positions in (24, 6, 24, 2, 6):
        index, weight = keys.queries(2, positions, 1)
        assert weight.shape == (1, len(index), 1) and weight.all()
    assert sorted(found[:2]) == [6, 24] and found[2:] == [2], "one that was not announced is found alone"


def test_what_steps_share_is_made_once(of_text, monkeypatch):
    """Text's, subject's and image tokens' keys: the second pass makes none, and gives what a pass without them gives."""
    self_attn, cross_attn, mask = self_attention(), cross_attention(), named_masks(["some"])
    x, text, tokens = torch.randn(2, 24, CHANNELS), torch.randn(2, 7, TEXT), tuple(torch.randn(2, 4, CHANNELS) for _ in range(2))
    label, made = torch.tensor([[0.0, 1, 1, 0, 0, 0, 0]]), {}
    context, keys = ContextConditioning({5: tokens}), subject(reference(batch=1), mask)

    def passed(made):
        recorder = Recorder(label_tokens=label)
        given = Conditioning(keys, context, recorder, made)
        return self_attn(x, conditioning=given), cross_attn(x, text, conditioning=given), recorder.label_maps[5]

    alone, first = passed(None), passed(made)
    assert set(made) == {(4, "subject"), *((5, name) for name in (["columns"] if of_text == "columns" else ["text", "label", "context"]))}
    for layer in (cross_attn.to_k, cross_attn.to_v):
        monkeypatch.setattr(layer, "forward", lambda *_: pytest.fail("made a second time"))
    for a, b, c in zip(alone, first, passed(made), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@both_ways
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("subjects", [1, 2])
def test_no_generated_mask_means_no_masking(subjects):
    attn, x, key_value = self_attention(), torch.randn(2, 24, CHANNELS), reference(subjects)
    m_ref = random_mask(subjects, (4, 6))
    every = [t.expand(2, -1, -1) for t in key_value]
    expected = equation_3(attn, x, every, m_ref.flatten(1).expand(2, -1), torch.ones(2, 24), 0.8 * 0.6)
    torch.testing.assert_close(run(attn, x, subject(key_value, m_ref)), expected, atol=2e-6, rtol=1e-5)


@both_ways
def test_an_empty_mask_adds_nothing_and_leaves_others_alone():
    attn, x = self_attention(), torch.randn(2, 24, CHANNELS)
    out, plain = run(attn, x, subject(reference(), named_masks(["empty", "some"]))), attn(x)
    assert torch.equal(out[0], plain[0])
    assert not torch.allclose(out[1], plain[1])


def test_gradients_with_an_empty_mask_are_finite():
    attn, key_value = self_attention(), [t.requires_grad_() for t in reference()]
    run(attn, torch.randn(2, 24, CHANNELS), subject(key_value, torch.zeros(2, 1, 4, 6))).sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in key_value)


@both_ways
def test_several_rows_of_each_subject_attend_to_it():
    """As many rows a subject, side by side; M_gen is each row's own."""
    attn, x, key_value, m_ref = self_attention(), torch.randn(6, 24, CHANNELS), reference(), named_masks(["some", "one"])
    m_gen = random_mask(6, (4, 6), soft=True)
    every, kept = [t.repeat_interleave(3, 0) for t in key_value], m_ref.flatten(1).repeat_interleave(3, 0)
    expected = equation_3(attn, x, every, kept, m_gen.flatten(1), 0.8 * 0.6)
    given = subject(key_value, m_ref, m_gen)
    given.rows_per_subject = 3
    torch.testing.assert_close(run(attn, x, given), expected, atol=2e-6, rtol=1e-5)


def test_refuses_another_number_of_rows_than_the_subjects_have():
    """Two subjects under guidance, say, whose rows do not lie side by side."""
    with pytest.raises(ValueError, match="2 subjects of 1 rows each for a batch of 4"):
        run(self_attention(), torch.randn(4, 24, CHANNELS), subject(reference(), named_masks(["some", "some"])))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("mask", [None, random_mask(2, (4, 6), soft=True)], ids=["unmasked", "masked"])
def test_context_attention(mask):
    attn, x, text = cross_attention(), torch.randn(2, 24, CHANNELS), torch.randn(2, 7, TEXT)
    key, value = torch.randn(2, 4, CHANNELS), torch.randn(2, 4, CHANNELS)
    context = ContextConditioning({5: (key, value)}, 0.3, None if mask is None else MaskPyramid(mask, (4, 6)))
    out = attn(x, text, conditioning=Conditioning(context=context))
    query, weight = x @ attn.to_q.weight.T, 0.3 if mask is None else 0.3 * mask.flatten(1)[..., None]
    expected = explicit(query, text @ attn.to_k.weight.T, text @ attn.to_v.weight.T) + weight * explicit(query, key, value)
    torch.testing.assert_close(out, expected @ attn.to_out[0].weight.T + attn.to_out[0].bias, atol=2e-6, rtol=1e-5)


@pytest.fixture(params=["columns", "attentions"])
def of_text(request, monkeypatch):
    """The text, the label's map and the image tokens of one matrix, as on a CPU, and of an attention each."""
    monkeypatch.setattr(attention, "by_columns", lambda query, keys: request.param == "columns")
    return request.param


def test_a_matrix_serves_where_it_is_small_and_its_type_is_multiplied_quickly(monkeypatch):
    query = torch.zeros(2, 64, CHANNELS)
    assert attention.by_columns(query, 96) and not attention.by_columns(query.to(torch.float16), 96) and not attention.by_columns(query.to("meta"), 96)
    assert attention.by_columns(query, 2**13) and not attention.by_columns(query, 2**13 + 1), "128 rows of a million probabilities"
    supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert attention.by_columns(query.to(torch.bfloat16), 96) == supported
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert attention.by_columns(query, 96) and not attention.by_columns(query.to(torch.bfloat16), 96), "a build that has no such operator"
    monkeypatch.setenv("MOMA_KERNELS", "0")
    assert not attention.by_columns(query, 96)


@pytest.mark.usefixtures("way", "of_text")
@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("context", [False, True])
def test_label_map(rows, context):
    """Head-mean probability of the label's tokens, summed over them, for the conditional (last) rows, or all without guidance; the layer's output beside it."""
    attn, x, text = cross_attention(), torch.randn(4, 24, CHANNELS), torch.randn(4, 7, TEXT)
    tokens = torch.zeros(rows, 7)
    tokens[0, 2], tokens[1, 3:5] = 1, 1
    recorder, image = Recorder(label_tokens=tokens), tuple(torch.randn(4, 4, CHANNELS) for _ in range(2))
    out = attn(x, text, conditioning=Conditioning(context=ContextConditioning({5: image}, 0.3) if context else None, recorder=recorder))
    found = recorder.label_maps[5]
    query, key, value, d = x @ attn.to_q.weight.T, text @ attn.to_k.weight.T, text @ attn.to_v.weight.T, CHANNELS // HEADS
    for row in range(rows):
        total = torch.zeros(24)
        for h in range(HEADS):
            part = slice(h * d, (h + 1) * d)
            probability = torch.softmax(query[row - rows, :, part] @ key[row - rows, :, part].T / math.sqrt(d), -1)
            total += (probability * tokens[row]).sum(-1) / HEADS
        torch.testing.assert_close(found[row].mean(0) if found.dim() == 3 else found[row], total)
    expected = explicit(query, key, value) + (0.3 * explicit(query, *image) if context else 0)
    torch.testing.assert_close(out, expected @ attn.to_out[0].weight.T + attn.to_out[0].bias, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_without_conditioning_it_is_diffusers_processor_bit_for_bit(masked):
    """Under a mask of keys, and with an output that is scaled, too."""
    for attn, text, keys in ((self_attention(), None, 24), (cross_attention(), torch.randn(2, 7, TEXT), 7)):
        x, attn.rescale_output_factor = torch.randn(2, 24, CHANNELS), 2.0 if masked else 1.0
        bias = torch.where(torch.rand(2, 1, keys) > 0.5, 0.0, -1e4) if masked else None
        mine = attn(x, text, attention_mask=bias)
        attn.set_processor(AttnProcessor2_0())
        assert torch.equal(mine, attn(x, text, attention_mask=bias))
