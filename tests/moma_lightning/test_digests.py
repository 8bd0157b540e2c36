"""What a model is known by: the content of its files, also behind links."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from experiments.mini.models import MINI
from moma_lightning.digests import content_digest, same_identity


def test_the_shipped_base_has_the_digest_of_its_manifest():
    """Names and sha256 in order: what stamps, caches and tables of before say of a folder without links holds."""
    files = json.loads(Path(MINI, "manifest.json").read_text())["files"]
    inside = sorted(Path(name).relative_to("base") for name in files if name.startswith("base/"))
    digest = hashlib.sha256(b"".join(str(name).encode() + bytes.fromhex(files[f"base/{name}"]["sha256"]) for name in inside))
    assert content_digest(Path(MINI, "base")) == digest.hexdigest()[:16]


@pytest.fixture
def linked(tmp_path) -> Path:
    """A base whose UNet lies elsewhere, with a link that leads back, one to nothing and a hidden one."""
    base, unet = tmp_path / "base", tmp_path / "shared/unet_v1"
    for folder in (base, unet / "deep"):
        folder.mkdir(parents=True)
    (base / "model_index.json").write_text("{}")
    (unet / "deep/weights").write_text("v1")
    for link, target in ((base / "unet", unet), (base / ".git", unet), (unet / "deep/up", base), (base / "gone", tmp_path / "gone")):
        link.symlink_to(target)
    return base


def test_what_lies_behind_a_linked_folder_counts_as_if_it_lay_there(linked, tmp_path):
    plain = tmp_path / "plain"
    (plain / "unet/deep").mkdir(parents=True)
    shutil.copy(linked / "model_index.json", plain)
    shutil.copy(linked / "unet/deep/weights", plain / "unet/deep")
    assert content_digest(linked) == content_digest(plain)
    (linked / "unet/deep/weights").write_text("v2")
    assert content_digest(linked) != content_digest(plain)


@pytest.mark.parametrize(("then", "now", "is_same"), [
    ("o/m@main (abc)", "o/m@main (abc)", True), ("o/m@main (abc)", "o/m@main", True), ("o/m@main (abc)", "o/m@main (def)", False),
    ("o/m@main", "o/m@main (def)", False), ("o/m@main (abc)", "o/n@main", False),
    ("o/m@main/unet (abc)", "o/m@abc/unet", True), ("o/m (abc)", "o/m@abc", True), ("o/m@main (abc)", "o/m@def", False),
    ("vit.dino (abc)", "vit.dino (def)", False),
    (None, "o/m@main", False), ("o/m@main", None, False), (None, None, True),
])
def test_a_commit_counts_where_it_is_known_and_by_its_own_name(then, now, is_same):
    assert same_identity(then, now) is is_same
    assert same_identity({"dino": then, "clip": "c"}, {"dino": now, "clip": "c"}) is is_same
    assert not same_identity({"dino": then}, {"dino": now, "clip": "c"})


def test_what_may_not_be_read_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "a").write_text("a")
    before, listed = content_digest(tmp_path), Path.iterdir

    def iterdir(path):
        if path.name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert content_digest(tmp_path) == before
