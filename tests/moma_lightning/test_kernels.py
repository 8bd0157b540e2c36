"""The Triton kernels against explicit matrices: compiled where there is a GPU, else run by Triton's interpreter (tests/conftest.py)."""

import inspect
import math

import pytest
import torch

from moma_lightning.models import kernels

pytest.importorskip("triton")
HEADS, DEVICE = 3, "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def device():
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


def explicit(query, key, value, bias=0.0):
    """Probabilities [batch, heads, queries, keys] and what is attended to [batch, queries, channels], in float64."""
    q, k, v = (x.double().unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (query, key, value))
    probability = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
    return probability, (probability @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("channels", [8, 40, 160])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_attention(channels, weighted):
    """More positions and tokens than one block, and not its multiples; labels of the last rows alone; label weights other than 0 and 1."""
    width = HEADS * channels
    query, text, image = torch.randn(3, 70, width), torch.randn(2, 3, 77, width), torch.randn(2, 3, 4, width)
    labels, weight = torch.rand(2, 77), torch.rand(3, 70) if weighted else None
    output, label = kernels.cross_attention(query, tuple(text), tuple(image), labels, HEADS, 0.7, weight)
    probability, expected = explicit(query, *text)
    expected += 0.7 * (1 if weight is None else weight[..., None]) * explicit(query, *image)[1]
    torch.testing.assert_close(output.double(), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(label.double(), (probability[1:] * labels[:, None, None]).sum(-1), atol=2e-6, rtol=1e-5)


def test_cross_attention_to_the_text_alone():
    query, text = torch.randn(2, 20, 24), torch.randn(2, 2, 7, 24)
    output, label = kernels.cross_attention(query, tuple(text), None, None, HEADS)
    torch.testing.assert_close(output.double(), explicit(query, *text)[1], atol=2e-6, rtol=1e-5)
    assert label is None


@pytest.mark.parametrize("channels", [8, 40])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.4, 1.0])
def test_subject_attention(channels, share):
    """Any number of places, a whole block without one among them; keys of any weight."""
    width = HEADS * channels
    query, before = torch.randn(2, 2, 150, width)
    key, value = torch.randn(2, 70, width)
    bias, weight = torch.rand(70).log(), torch.rand(300) * (torch.rand(300) < share)
    places, output = torch.nonzero_static(weight, size=300).flatten(), before.clone()
    kernels.add_subject_attention_(output, query, key, value, bias, places, weight, HEADS)
    _, attended = explicit(query.flatten(0, 1)[None], key[None], value[None], bias.double())
    torch.testing.assert_close(output.double(), before.double() + (weight[:, None] * attended[0]).view_as(before), atol=2e-6, rtol=1e-5)
    assert torch.equal(output.flatten(0, 1)[weight == 0], before.flatten(0, 1)[weight == 0])


def test_tokens_that_do_not_fit_the_queries_are_refused():
    query, text, one = torch.randn(2, 20, 24), tuple(torch.randn(2, 2, 7, 24)), tuple(torch.randn(2, 1, 7, 24))
    for options in ((one, None, None), (text, one, None), (text, None, torch.zeros(1, 6))):
        with pytest.raises(ValueError, match="do not fit 2 rows of queries"):
            inspect.unwrap(kernels.cross_attention)(query, *options, HEADS)  # the tests' type checks would refuse them first
    weight = torch.rand(1, 20)
    given = [kernels.cross_attention(query, text, text, None, HEADS, 1.0, w)[0] for w in (weight, weight.repeat(2, 1))]
    assert torch.equal(*given), "one mask for all rows"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it does")
def test_where_they_do_not_run_a_warning_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    with pytest.warns(UserWarning, match="for 8 heads of 40 channels do not run on a GPU"):
        assert not kernels._tried.__wrapped__(0, torch.bfloat16, 8, 320)
    monkeypatch.setenv("MOMA_KERNELS", "0")
    assert not kernels._tried.__wrapped__(0, torch.bfloat16, 8, 320)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it does")
def test_a_shortage_of_memory_says_nothing_of_the_kernels(monkeypatch):
    """They are tried again, once a smaller batch leaves more of it."""
    answers = iter([torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Triton Error [CUDA]: out of memory"), RuntimeError("no compiler")])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: (_ for _ in ()).throw(next(answers)))
    kernels._tried.cache_clear()
    for told in ("CUDA out of memory", "Triton Error"):
        with pytest.raises(RuntimeError, match=told):
            kernels.usable(0, torch.bfloat16, 8, 64)
    with pytest.warns(UserWarning, match="no compiler"):
        assert not kernels.usable(0, torch.bfloat16, 8, 64)
    kernels._tried.cache_clear()


def test_they_are_for_gpus_in_16_bits_without_gradients():
    query = torch.zeros(1, 4, 24, dtype=torch.bfloat16)
    with torch.no_grad():
        assert kernels.fit(query, HEADS) == query.is_cuda and not kernels.fit(query.float(), HEADS) and not kernels.fit(query.cpu(), HEADS)
    assert not kernels.fit(query, HEADS)
