"""The two attentions that MoMA adds, as one Triton kernel a layer: on a GPU in 16 bits, wherever no gradients are asked for (sampling, validation).

With PyTorch's own operations each takes five or more small launches a layer, for which a GPU that draws few pictures waits, and reads queries and
output several times. The formulas are those of `attention.py`, which serves everywhere else. Nothing here waits for the GPU and no shape depends on
M_gen, so that the kernels can be captured in CUDA graphs (`torch.compile`). MOMA_KERNELS=0 in the environment leaves them out.
"""

import functools
import os
import warnings
from typing import no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton
    triton = None

#: Channels of a head beyond which a kernel's blocks would not fit a GPU's shared memory.
MOST_CHANNELS = 256
#: From so many queries on a launch fills the GPU with blocks of full size.
MANY_QUERIES = 2**15


def fit(query: Float[Tensor, "batch positions channels"], heads: int) -> bool:
    """Whether the kernels can and should compute for these queries. Triton launches on the current GPU only."""
    return (
        triton is not None and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not torch.is_grad_enabled()
        and query.shape[2] <= heads * MOST_CHANNELS and not isinstance(query, FakeTensor) and query.device.index == torch.cuda.current_device()
        and usable(query.device.index, query.dtype, heads, query.shape[2])
    )


@torch.compiler.assume_constant_result
def wanted() -> bool:
    """MOMA_KERNELS=0 in the environment asks for PyTorch's attention alone, whose bits are diffusers'. To torch.compile it is a constant."""
    return os.environ.get("MOMA_KERNELS") != "0"


@torch.compiler.assume_constant_result
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of this type by instructions of its own; where it does not, they take ten times as long."""
    if dtype == torch.bfloat16:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # of builds with oneDNN; macOS' are without
    return dtype == torch.float32


@torch.compiler.assume_constant_result
def usable(device: int, dtype: torch.dtype, heads: int, width: int) -> bool:
    """Whether both kernels have run there once, at their largest blocks; a warning says why not. To torch.compile it is a constant."""
    return _tried(device, dtype, heads, width)


@functools.cache
def _tried(device: int, dtype: torch.dtype, heads: int, width: int) -> bool:
    if not wanted():
        return False
    if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        return False  # no bfloat16, and Triton supports later ones
    try:
        with torch.no_grad():
            there = {"device": f"cuda:{device}", "dtype": dtype}
            query, text, image = (torch.zeros(1, n, width, **there) for n in (MANY_QUERIES, 77, 4))
            output, _ = cross_attention(query, (text, text), (image, image), torch.zeros(1, 77, device=query.device), heads)
            places, weight, bias = torch.arange(MANY_QUERIES, device=query.device), torch.ones(MANY_QUERIES, device=query.device), text.new_zeros(77).float()
            add_subject_attention_(output, query, text[0], text[0], bias, places, weight, heads)
            torch.cuda.synchronize(device)
    except Exception as error:  # of many kinds: no compiler, no room in shared memory, a folder that cannot be written
        if "out of memory" in str(error):
            raise  # which says nothing of the kernels; an error is not kept, so they are tried again
        warnings.warn(f"Triton's kernels for {heads} heads of {width // heads} channels do not run on {torch.cuda.get_device_name(device)} ({error}): "
                      "PyTorch's operations serve, which take longer", stacklevel=2)
        return False
    return True


#: Up to so many channels of a head: queries and keys of a block, warps, stages. The fastest of some dozens on an H200, SD 1.5 at 512 pixels.
CROSS = {64: (64, 32, 4, 1), 128: (64, 128, 4, 1), 256: (64, 32, 8, 1)}
SUBJECT = {64: (128, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 32, 4, 2)}


def blocks(channels: int, queries: int, chosen: dict[int, tuple[int, int, int, int]]) -> dict[str, int]:
    """A launch's block sizes for heads of so many channels. Few queries are cut into smaller blocks, so that more of the GPU takes part."""
    width = max(16, triton.next_power_of_2(channels))
    block, keys, warps, stages = chosen[max(64, width)]
    block = block if queries >= MANY_QUERIES else max(32, block // 2)
    return {"BLOCK": block, "BLOCK_KEYS": keys, "BLOCK_CHANNELS": width, "num_warps": warps, "num_stages": stages}


def cross_attention(
    query: Float[Tensor, "batch positions channels"],
    text: tuple[Float[Tensor, "batch text channels"], Float[Tensor, "batch text channels"]],
    image: tuple[Float[Tensor, "batch tokens channels"], Float[Tensor, "batch tokens channels"]] | None,
    labels: Float[Tensor, "rows text"] | None,
    heads: int,
    scale: float = 1.0,
    weight: Float[Tensor, "#batch positions"] | None = None,
) -> tuple[Float[Tensor, "batch positions channels"], Float[Tensor, "rows heads positions"] | None]:
    """softmax(Q K^T / sqrt(d)) V over the text, plus scale * weight times the same over the image tokens; and the label's map by each head.

    The map is the text's probabilities summed over the label's tokens, of the last `rows` of the batch. Keys and values are to be contiguous.

    Raises ValueError where text or image tokens are of another number of rows than the queries, or the labels of another length than the text:
    a kernel would read what is not theirs.
    """
    batch, positions, width = query.shape
    rows = 0 if labels is None else len(labels)
    query, (key, value) = query.contiguous(), text
    image_key, image_value = text if image is None else image  # what is not there is not read, but something has to be handed over
    if not len(key) == len(image_key) == batch or (labels is not None and labels.shape[1] != key.shape[1]):
        raise ValueError(f"text of {tuple(key.shape[:2])}, image tokens of {tuple(image_key.shape[:2])} and labels of "
                         f"{None if labels is None else tuple(labels.shape)} do not fit {batch} rows of queries")
    output = torch.empty_like(query)
    probability = torch.empty(rows, heads, positions, device=query.device, dtype=torch.float32)
    labels = output if labels is None else labels.float().contiguous()
    weight, weighted = (output, False) if weight is None else (weight.float().expand(batch, positions).contiguous(), True)
    sizes = blocks(width // heads, batch * positions, CROSS)
    _cross_attention[(triton.cdiv(positions, sizes["BLOCK"]), heads, batch)](
        query, key, value, image_key, image_value, labels, weight, output, probability, positions, key.shape[1], image_key.shape[1], batch - rows, scale,
        LABELLED=rows > 0, IMAGE=image is not None, WEIGHTED=weighted, HEADS=heads, CHANNELS=width // heads, **sizes,
    )
    return output, probability if rows else None


def add_subject_attention_(
    output: Float[Tensor, "batch positions channels"],
    query: Float[Tensor, "batch positions channels"],
    key: Float[Tensor, "kept channels"],
    value: Float[Tensor, "kept channels"],
    bias: Float[Tensor, " kept"],
    places: Int[Tensor, " all_positions"],
    weight: Float[Tensor, " all_positions"],
    heads: int,
) -> Float[Tensor, "batch positions channels"]:
    """`output` += weight * (softmax(Q K^T / sqrt(d) + bias) V), in place, at `places` of all rows' positions; places of -1 end the list."""
    channels = query.shape[2] // heads
    sizes, output = blocks(channels, len(places), SUBJECT), output.contiguous()
    _add_subject_attention[(triton.cdiv(len(places), sizes["BLOCK"]), heads)](
        output, query.contiguous(), key, value, bias, places, weight, len(places), len(key), HEADS=heads, CHANNELS=channels, **sizes
    )
    return output


if triton is not None:
    LOG2E = tl.constexpr(1.4426950408889634)

    @triton.jit
    @no_type_check
    def _attend(query, key, value, bias, labels, tokens, channel, BIASED: tl.constexpr, LABELLED: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
                BLOCK: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
        """One head: attention to `tokens` keys, a block of them after the other, and the probability of the label's. key, value: the first token's channels."""
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        label = tl.zeros([BLOCK], tl.float32)
        attended = tl.zeros([BLOCK, BLOCK_CHANNELS], tl.float32)
        for first in range(0, tokens, BLOCK_KEYS):
            token = first + tl.arange(0, BLOCK_KEYS)
            place = token[:, None] * WIDTH + channel[None, :]
            there = (token < tokens)[:, None] & (channel < CHANNELS)[None, :]
            k = tl.load(key + place, there, 0.0)
            scores = tl.dot(query, tl.trans(k), input_precision="ieee") * (LOG2E / tl.sqrt(float(CHANNELS)))
            if BIASED:
                scores += tl.load(bias + token, token < tokens, float("-inf")).to(tl.float32)[None, :] * LOG2E
            else:
                scores = tl.where((token < tokens)[None, :], scores, float("-inf"))
            above = tl.maximum(highest, tl.max(scores, 1))
            shrink = tl.exp2(highest - above)
            weight = tl.exp2(scores - above[:, None])
            total = total * shrink + tl.sum(weight, 1)
            if LABELLED:
                label = label * shrink + tl.sum(weight * tl.load(labels + token, token < tokens, 0.0)[None, :], 1)
            v = tl.load(value + place, there, 0.0)
            attended = attended * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
            highest = above
        return attended / total[:, None], label / total

    @triton.jit
    @no_type_check
    def _cross_attention(query, key, value, image_key, image_value, labels, weight, output, probability, positions, tokens, image_tokens, unlabelled, scale,
                         LABELLED: tl.constexpr, IMAGE: tl.constexpr, WEIGHTED: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr,
                         BLOCK: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
        position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
        channel = tl.arange(0, BLOCK_CHANNELS)
        width: tl.constexpr = HEADS * CHANNELS
        there = (position < positions)[:, None] & (channel < CHANNELS)[None, :]
        place = (row * positions + position)[:, None] * width + head * CHANNELS + channel[None, :]
        q = tl.load(query + place, there, 0.0)
        first = row * tokens * width + head * CHANNELS
        its_labels = labels + tl.maximum(row - unlabelled, 0) * tokens
        result, label = _attend(q, key + first, value + first, key, its_labels, tokens, channel, False, LABELLED, width, CHANNELS,
                                BLOCK, BLOCK_KEYS, BLOCK_CHANNELS)
        if LABELLED:
            asked = (position < positions) & (row >= unlabelled)
            tl.store(probability + ((row - unlabelled) * HEADS + head) * positions + position, label, asked)
        if IMAGE:
            first = row * image_tokens * width + head * CHANNELS
            added, _ = _attend(q, image_key + first, image_value + first, key, labels, image_tokens, channel, False, False, width, CHANNELS,
                               BLOCK, 16, BLOCK_CHANNELS)
            if WEIGHTED:
                added *= tl.load(weight + row * positions + position, position < positions, 0.0)[:, None]
            result += scale * added
        tl.store(output + place, result.to(output.dtype.element_ty), there)

    @triton.jit
    @no_type_check
    def _add_subject_attention(output, query, key, value, bias, places, weight, asked, kept, HEADS: tl.constexpr, CHANNELS: tl.constexpr,
                               BLOCK: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
        number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        head, channel = tl.program_id(1), tl.arange(0, BLOCK_CHANNELS)
        width: tl.constexpr = HEADS * CHANNELS
        at = tl.load(places + number, number < asked, -1)
        if tl.max(at, 0) >= 0:
            there = (at >= 0)[:, None] & (channel < CHANNELS)[None, :]
            place = at[:, None] * width + head * CHANNELS + channel[None, :]
            q = tl.load(query + place, there, 0.0)
            first = head * CHANNELS
            added, _ = _attend(q, key + first, value + first, bias, bias, kept, channel, True, False, width, CHANNELS, BLOCK, BLOCK_KEYS, BLOCK_CHANNELS)
            added *= tl.load(weight + at, at >= 0, 0.0)[:, None]
            before = tl.load(output + place, there, 0.0).to(tl.float32)
            tl.store(output + place, (before + added).to(output.dtype.element_ty), there)
