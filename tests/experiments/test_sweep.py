"""A sweep file's grid, point by point; running one is in test_yamls.py."""

from pathlib import Path

import pytest
import yaml

from experiments import sweep as module
from experiments.sweep import points, read

COMMAND = ["${env}", "${interpreter}", "-m", "evaluation", "point", "${args}"]


def written(tmp_path, **changes):
    sweep = {"method": "grid", "parameters": {"moma.beta": {"values": [0.0, 1.0]}, "moma.texture_beta": {"values": [None, 0.4]}}, "command": COMMAND}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(sweep | changes))
    return tmp_path / "both.yaml"


def test_every_point_of_the_product_and_nothing_is_null(tmp_path):
    found = list(points(read(written(tmp_path)), ["--run=x"]))
    assert found == [["point", f"--moma.beta={beta}", f"--moma.texture_beta={texture}", "--run=x"] for beta in (0.0, 1.0) for texture in ("null", 0.4)]


def test_a_file_without_a_name_is_called_as_it_is(tmp_path):
    assert read(written(tmp_path))["name"] == "both" and read(written(tmp_path, name="mine"))["name"] == "mine"


@pytest.mark.parametrize(("changes", "told"), [
    ({"method": "bayes"}, "only `method: grid`"), ({"parameters": {"moma.beta": {"min": 0, "max": 1}}}, "only `method: grid`"),
    ({"command": ["${env}", "${interpreter}", "train.py"]}, "its command must be"),
    ({"parameters": {"protocol": {"values": ["a"]}}}, "not protocol"),
])
def test_what_does_not_run_offline_is_told(tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        read(written(tmp_path, **changes))


def test_with_a_key_the_file_goes_to_the_server_with_the_points_arguments(tmp_path, monkeypatch):
    """Any method of wandb's, since the server chooses the points; its agent then runs the command here."""
    sent, ran = [], []
    monkeypatch.setattr(module, "wandb_mode", lambda: "online")
    monkeypatch.setattr(module.wandb, "sweep", lambda sweep, project: sent.append((sweep, project)) or "abc123")
    monkeypatch.setattr(module.subprocess, "run", lambda command, check: ran.append((command, check)))
    monkeypatch.setattr("sys.argv", ["sweep", str(written(tmp_path, method="bayes", project="mine")), "--run=x"])
    module.main()
    ((sweep, project),) = sent
    assert project == "mine" and sweep["command"] == [*COMMAND, "--run=x"] and sweep["method"] == "bayes"
    assert ran == [(["wandb", "agent", "--project", "mine", "abc123"], True)]
    monkeypatch.setattr(module, "run_ablation", lambda config: tables.append((config.ablation.name, list(config.ablation.methods), config.run)))
    tables = []
    monkeypatch.setattr("sys.argv", ["sweep", str(Path("experiments/sweeps/beta.yaml")), "--run=x"])
    module.main()
    ((name, methods, folder),) = tables
    assert (name, folder) == ("moma-beta", "x") and "moma_beta0.5" in methods, "a grid ends in its table, as without a key"
    monkeypatch.setenv("WANDB_PROJECT", "another")
    monkeypatch.setattr("sys.argv", ["sweep", str(written(tmp_path, method="bayes"))])
    module.main()
    assert sent[-1][1] == "another" and ran[-1][0] == ["wandb", "agent", "--project", "another", "abc123"], "of a file that names none"
