import io
import json
import tarfile
import warnings

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from datamodules.samples import WHOLE_SHARD, BadSampleError, BadSamples, decode, read_shards, to_pixel_values, to_subject_mask


def fields(**changes) -> bytes:
    return json.dumps({"caption": "a cat on a lake", "label": "cat"} | changes).encode()


@pytest.fixture
def as_read(tools):
    return lambda **files: {"__key__": "k", "__url__": "u"} | tools.sample(7, **files)


def test_a_good_sample(as_read):
    triplet = decode(as_read(json=fields()), image_size=8)
    assert (triplet.caption, triplet.label, triplet.key) == ("a cat on a lake", "cat", "k")
    assert triplet.pixel_values.shape == (3, 8, 8) and triplet.subject_mask.shape == (1, 8, 8)
    assert triplet.subject_mask.unique().tolist() == [0, 1] and triplet.subject_mask.sum() == 9


@pytest.mark.parametrize("change, reason", [
    ({"json": None}, "json is missing"),
    ({"json": b"{"}, "json cannot be read"),
    ({"json": b"[]"}, "caption is missing"),
    ({"json": fields(caption=None)}, "caption is missing"),
    ({"json": fields(caption="  ")}, "caption is missing"),
    ({"json": fields(label="")}, "label is missing"),
    ({"json": fields(caption="a caterpillar on a lake")}, "label is absent from the caption: 'cat'"),
    ({"json": fields(caption_full=5)}, "caption_full is no text: 5"),
    ({"json": fields(caption_full=["a cat"])}, "caption_full is no text"),
    ({"png": None}, "picture is missing"),
    ({"png": b"x" * 50}, "picture cannot be read"),
    ({"mask_png": None}, "mask is missing"),
    ({"mask_png": b""}, "mask cannot be used"),
])
def test_bad_samples_say_why(as_read, change, reason):
    with pytest.raises(BadSampleError, match=reason):
        decode(as_read(**change), image_size=8)


def test_truncated_jpeg(as_read, tools):
    noise = Image.fromarray(tools.rng.integers(0, 255, (64, 64, 3), np.uint8))
    file = tools.encode(noise, "JPEG")
    decode(as_read(png=None, jpg=file, mask_png=tools.encode(tools.mask((64, 64)))), 16)
    with pytest.raises(BadSampleError, match="picture cannot be read: image file is truncated"):
        decode(as_read(png=None, jpg=file[: len(file) // 2]), 16)


def test_a_jpeg_is_decoded_no_smaller_than_it_is_shown(as_read, tools):
    """Stripes that a decoding at half size would wash out."""
    stripes = Image.fromarray(np.tile(np.repeat(np.uint8([0, 255]), 2), (64, 16))).convert("RGB")
    jpeg = tools.encode(stripes, "JPEG", quality=100)
    files = {"png": None, "mask_png": tools.encode(tools.mask((64, 64)))}
    reduced, whole = (decode(as_read(**files | {name: file}), 40) for name, file in (("jpg", jpeg), ("png", tools.encode(Image.open(io.BytesIO(jpeg))))))
    torch.testing.assert_close(reduced.pixel_values, whole.pixel_values, atol=0.02, rtol=0)


def test_empty_masks(as_read, tools):
    noise = Image.fromarray(np.full((16, 16), 9, np.uint8))  # what JPEG leaves of an empty mask
    with pytest.raises(BadSampleError, match="mask is empty"):
        decode(as_read(mask_png=tools.encode(noise)), 16)
    speck = tools.mask((64, 64), (1, 1, 2, 2))
    with pytest.raises(BadSampleError, match="nothing of its mask is left at 4x4"):
        decode(as_read(png=tools.encode(tools.picture(size=(64, 64))), mask_png=tools.encode(speck)), 4)


def test_mask_of_another_size(as_read, tools):
    triplet = decode(as_read(mask_png=tools.encode(tools.mask((32, 32), (8, 8, 20, 20)))), 16)
    assert torch.equal(triplet.subject_mask, decode(as_read(), 16).subject_mask)
    with pytest.raises(BadSampleError, match="mask of 16x32 does not fit"):
        decode(as_read(mask_png=tools.encode(tools.mask((16, 32)))), 16)


def test_flip_turns_picture_and_mask_together(as_read, tools):
    red = tools.picture()
    red.paste((255, 0, 0), (4, 4, 10, 10))
    sample, seen = as_read(png=tools.encode(red)), set()
    for seed in range(12):
        triplet = decode(sample, 16, np.random.default_rng(seed), flip=True)
        is_red = (triplet.pixel_values[0] > 0.9) & (triplet.pixel_values[1] < -0.9)
        assert torch.equal(is_red.float(), triplet.subject_mask[0])
        seen.add(int(triplet.subject_mask[0, 5].argmax()))
    assert seen == {4, 6}


def test_tensors_have_their_ranges():
    picture = torch.tensor([[[0]], [[127]], [[255]]], dtype=torch.uint8)
    assert torch.allclose(to_pixel_values(picture).flatten(), torch.tensor([-1.0, 127 / 127.5 - 1, 1.0]))
    mask = to_subject_mask(torch.tensor([[[0, 255]]], dtype=torch.uint8))
    assert mask.tolist() == [[[0.0, 1.0]]]


def bad_log(tmp_path, on_error="skip"):
    return BadSamples(tmp_path / "deep" / "bad.log", on_error)


def test_log_names_each_sample_once(tmp_path):
    with pytest.warns(UserWarning, match="a.tar, sample k1: mask is empty: why. It is skipped"):
        bad_log(tmp_path).report("a.tar", "k1", "mask is empty: why")
    log = bad_log(tmp_path)  # as another process would open it
    log.report("a.tar", "k1", "mask is empty: why")
    log.report("a.tar", "k2", "mask is empty: with\ta tab\nand more")
    assert log.path.read_text().splitlines() == ["a.tar\tk1\tmask is empty: why", "a.tar\tk2\tmask is empty: with a tab and more"]
    assert log.counts() == {"mask is empty": 2}


def test_each_shard_that_is_lost_is_warned_of(tmp_path):
    """Bad samples are nothing new where one has been met before, a disk that is gone is."""
    log = bad_log(tmp_path)
    with pytest.warns(UserWarning, match="k1"):
        log.report("a.tar", "k1", "mask is empty")
    for shard in ("b.tar", "c.tar"):
        with pytest.warns(UserWarning, match=f"{shard}: shard cannot be read: stale. The rest of it is left out"):
            log.report(shard, WHOLE_SHARD, "shard cannot be read: stale")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.report("a.tar", "k2", "mask is empty")
        log.report("b.tar", WHOLE_SHARD, "shard cannot be read: stale")


def test_a_lost_shard_does_not_keep_bad_samples_unsaid(tmp_path):
    log = bad_log(tmp_path)
    with pytest.warns(UserWarning, match="The rest of it"):
        log.report("b.tar", WHOLE_SHARD, "shard cannot be read: stale")
    with pytest.warns(UserWarning, match="all such are named in"):
        log.report("a.tar", "k1", "mask is empty")


def test_a_key_with_a_dot_is_told(as_read):
    with pytest.raises(BadSampleError, match=r"json is missing: a key has no dots, or b_0\.json is not <key>\.json"):
        decode({"__key__": "a", "__url__": "u", "b_0.png": b"", "b_0.json": b"{}"}, image_size=8)


def test_log_can_raise(tmp_path):
    with pytest.raises(BadSampleError, match=r"a.tar, sample k1: why"):
        bad_log(tmp_path, "raise").report("a.tar", "k1", "why")
    assert not (tmp_path / "deep").exists()


@pytest.fixture
def three(tmp_path, tools):
    return tools.write_tar(tmp_path / "x.tar", {f"s{i}": tools.sample(i) for i in range(3)})


@pytest.mark.filterwarnings("ignore:.*It is skipped")
def test_shard_cut_anywhere_is_named_and_its_beginning_used(three, tmp_path):
    whole = three.read_bytes()
    with tarfile.open(three) as tar:
        ends = {m.offset_data + -(-m.size // 512) * 512 for m in tar}
    assert [s["__key__"] for s in read_shards([str(three)], bad_log(tmp_path))] == ["s0", "s1", "s2"]
    assert not bad_log(tmp_path).lines()
    for length in (*sorted(ends), 700, 1300, max(ends) - 600):
        three.write_bytes(whole[:length])
        log = BadSamples(tmp_path / f"{length}.log", "skip")
        samples = list(read_shards([str(three)], log))
        assert [s["__key__"] for s in samples] == ["s0", "s1", "s2"][: len(samples)]
        (line,) = log.lines()
        assert line.startswith(f"{three}\t-\tshard is cut short") and len(line) < len(str(three)) + 100
        with pytest.raises(BadSampleError, match=r"x.tar, sample -: shard is cut short"):
            list(read_shards([str(three)], bad_log(tmp_path, "raise")))


@pytest.mark.filterwarnings("ignore:.*It is skipped")
@pytest.mark.parametrize("spoil", [
    lambda content, header: content[:header] + bytes([content[header] ^ 1]) + content[header + 1 :], lambda content, header: content + content])
def test_a_tar_with_more_behind_its_readable_end_is_named(three, tmp_path, spoil):
    """A bad header in the middle, or two tars in one file: readers stop there as at an end."""
    with tarfile.open(three) as tar:
        header = tar.getmembers()[4].offset
    three.write_bytes(spoil(three.read_bytes(), header))
    log = bad_log(tmp_path)
    assert 0 < len(list(read_shards([str(three)], log))) <= 3
    (line,) = log.lines()
    assert line.startswith(f"{three}\t-\tshard is cut short or damaged")


def test_files_of_a_local_tar_are_those_that_webdataset_finds(tmp_path):
    """Names of all kinds, files of no sample, links, folders and an empty file among them."""
    content = {"__meta__/a.txt": b"1", "__info__": b"2", "a.PNG": b"3", "a.mask.png": b"", "folder/b.json": b"5", "./c.png": b"6", "no_extension": b"7",
               "k" * 120 + ".png": b"8", "\u043a\u043b\u044e\u0447.png": b"9"}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, kind in (("a.json", tarfile.LNKTYPE), ("a.txt", tarfile.SYMTYPE), ("folder", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.PNG"
            tar.addfile(info)
    theirs = list(wds.tarfile_samples([{"url": str(tmp_path / "x.tar")}]))
    assert list(read_shards([str(tmp_path / "x.tar")], bad_log(tmp_path, "raise"))) == theirs and len(theirs) == 5


@pytest.mark.filterwarnings("ignore:.*It is skipped")
def test_a_header_that_asks_for_more_than_there_is_ends_its_shard(three, tmp_path):
    damaged = tarfile.TarInfo("s9.png")
    damaged.size = 2**50
    with tarfile.open(three) as tar:
        last = tar.getmembers()[-1]
    three.write_bytes(three.read_bytes()[: last.offset_data + -(-last.size // 512) * 512] + damaged.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    log = bad_log(tmp_path)
    assert len(list(read_shards([str(three)], log))) == 2
    assert log.lines().pop().endswith("shard is cut short or damaged: unexpected end of data")


@pytest.mark.filterwarnings("ignore:.*It is skipped")
@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, None])
def test_shards_that_are_none_do_not_stop_the_others(three, tmp_path, content):
    broken = tmp_path / "broken.tar"
    if content is not None:
        broken.write_bytes(content)
    log = bad_log(tmp_path)
    assert len(list(read_shards([str(broken), str(three)], log))) == 3
    assert len(log.lines()) == 1 and "broken.tar" in log.lines().pop()
