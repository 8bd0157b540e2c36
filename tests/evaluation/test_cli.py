from pathlib import Path

import pytest
from huggingface_hub import constants
from torch.multiprocessing import ProcessRaisedException

from evaluation import cli
from evaluation.cli import COMMANDS, main, parse
from evaluation.config import EvalConfig
from evaluation.methods import IpAdapter, Moma, RealImages, TextOnly
from experiments.mini.models import PROTOCOL, mini_foundation
from moma_lightning.foundation import FoundationConfig
from moma_lightning.wandb_mode import wandb_mode
from tests.evaluation.fakes import write_data

MINI = Path(__file__).parents[2] / "experiments" / "mini" / "eval.yaml"


def test_minis_config_names_the_rows_of_table_1():
    command, config = parse(["dreambooth", "--config", str(MINI)])
    assert command == "dreambooth"
    assert config.methods == {
        "real_images": RealImages(),
        "text_only": TextOnly(),
        "ip_adapter": IpAdapter(),
        "moma_beta0": Moma(beta=0.0),
        "moma_beta1": Moma(beta=1.0),
        "moma_guided": Moma(beta=0.5, guide_subject=True),
    }
    assert (config.data, config.adapter) == ("runs/mini/data/dreambooth", "runs/mini/stage2/adapter")
    assert config.resolved_protocol().name == "dreambooth-mini"


def test_the_mini_evaluation_stays_small():
    """2,000 pictures are about four minutes of sampling on two cores (experiments/LOG.md); the oracle makes none."""
    config = parse(["generate", "--config", str(MINI)])[1]
    protocol = config.resolved_protocol()
    pictures = 30 * (protocol.context_prompts + protocol.texture_prompts) * protocol.pictures_per_prompt
    assert pictures * sum(not method.is_oracle for method in config.methods.values()) <= 2000


def test_options_on_the_command_line_win():
    config = parse(["score", "--config", str(MINI), "--overrides", '{"pictures_per_prompt": 3}', "--report.subjects=2", "--run=elsewhere"])[1]
    assert config.resolved_protocol().pictures_per_prompt == 3
    assert config.report.subjects == 2
    assert str(config.pictures) == "elsewhere/eval/pictures"


def test_a_nested_override_changes_one_field_of_what_the_file_changes(tmp_path):
    more = tmp_path / "more.yaml"
    more.write_text("overrides: {sampler: {beta: 0.5}, pictures_per_prompt: 2}\n")
    sdxl = MINI.parents[1] / "sdxl_llava7b" / "eval.yaml"
    given = ["--config", str(sdxl), "--config", str(more), "--overrides.sampler.seed", "1", "--overrides.sampler.width=512"]
    config = parse(["score", *given, "--overrides", '{"dino": {"dtype": "bfloat16"}}'])[1]
    assert config.overrides == {"sampler": {"prompt_template": "photo of a {label}. {prompt}", "guidance_scale": 5.0, "seed": 1, "beta": 0.5, "width": 512},
                                "pictures_per_prompt": 2, "dino": {"dtype": "bfloat16"}}
    sampler = config.resolved_protocol().sampler
    assert (sampler.guidance_scale, sampler.seed, sampler.num_inference_steps) == (5.0, 1, 50)
    assert config.resolved_protocol().name == "moma-paper, modified"
    assert parse(["score", "--config", str(MINI)])[1].overrides == {}


def test_a_printed_config_reads_back_as_itself(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(["score", "--config", str(MINI), "--overrides.sampler.seed=3", "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert parse(["score", "--config", str(tmp_path / "printed.yaml")])[1] == parse(["score", "--config", str(MINI), "--overrides.sampler.seed=3"])[1]


@pytest.mark.parametrize("wrong", [["--stepz=3"], ["--report.stepz=3"], ["--methods.x=Nope"], ["--num_processes=many"], ["--overrides.stepz=3"],
                                   ["--overrides.sampler.seed=many"], ["--overrides", '{"sampler": {"stepz": 3}}'], ["--protocol=nope"]])
def test_unknown_keys_are_errors(wrong, capsys):
    with pytest.raises(SystemExit) as raised:
        parse(["generate", "--config", str(MINI), *wrong])
    assert raised.value.code == 2
    assert "error" in capsys.readouterr().err


def test_unknown_keys_in_a_file_are_errors(tmp_path, capsys):
    (tmp_path / "eval.yaml").write_text(f"protocol: {PROTOCOL}\nstepz: 3\n")
    with pytest.raises(SystemExit):
        parse(["generate", "--config", str(tmp_path / "eval.yaml")])
    assert "stepz" in capsys.readouterr().err


def test_several_commands_run_in_order_and_are_parsed_before_the_first(monkeypatch, caplog):
    caplog.set_level("INFO")
    ran = []
    monkeypatch.setattr(cli, "COMMANDS", {name: (lambda config, name=name: ran.append((name, str(config.run)))) for name in ("generate", "score")})
    main(["generate", "--config", str(MINI), "then", "score", "--config", str(MINI), "--run=elsewhere"])
    assert ran == [("generate", "runs/mini"), ("score", "elsewhere")]
    told = [record.getMessage().split(":")[0] for record in caplog.records if record.name == "evaluation.cli"]
    assert told == ["== generate", "== score"]  # and how long each took
    for wrong in (["score", "--stepz=3"], []):
        with pytest.raises(SystemExit):
            main(["generate", "--config", str(MINI), "then", *wrong])
    assert len(ran) == 2


def test_what_one_process_makes_is_not_made_by_the_others_of_torchrun(monkeypatch):
    ran = []
    monkeypatch.setattr(cli, "COMMANDS", {name: (lambda config, name=name: ran.append(name)) for name in COMMANDS})
    monkeypatch.setattr(cli.rank_zero_only, "rank", 1)
    for command in COMMANDS:
        main([command, "--config", str(MINI)])
    assert ran == ["generate", "score", "dreambooth", "ablate", "point"]


@pytest.mark.parametrize("name", ["../up", "differences", "title", "made_with", "methods", "published", "sampler"])
def test_method_names_must_be_folders(capsys, name):
    with pytest.raises(SystemExit):
        parse(["generate", "--config", str(MINI), f"--methods={{{name}: TextOnly}}"])
    assert f"cannot be called {name!r}" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("option", ["--batch_size=0", "--num_processes=-1"])
def test_there_is_one_of_each_at_least(option, capsys):
    with pytest.raises(SystemExit):
        parse(["generate", "--config", str(MINI), option])
    assert "each has to be 1 at least" in " ".join(capsys.readouterr().err.split())


def test_two_methods_of_one_display_name_are_refused(capsys):
    """In tables by that name one would take the other's row."""
    with pytest.raises(SystemExit):
        parse(["generate", "--config", str(MINI), "--methods={moma_mask0.5: TextOnly, moma_masking0.5: TextOnly}"])
    assert "would both be called 'MoMA, mask strength 0.5'" in " ".join(capsys.readouterr().err.split())


def test_what_names_no_protocol_and_no_models_is_refused(tmp_path, capsys):
    """Nothing of the mini world's stands in for what a full-size YAML forgets."""
    (tmp_path / "eval.yaml").write_text("run: runs/x\ndata: data\nfoundation: {base: owner/name}\n")
    with pytest.raises(SystemExit):
        parse(["generate", "--config", str(tmp_path / "eval.yaml")])
    told = capsys.readouterr().err
    assert all(f"generate.{name}" in told for name in ("protocol", "foundation.image_encoder", "foundation.mllm")) and "generate.foundation.base" not in told
    assert (FoundationConfig("base", "clip", "mllm").sam, FoundationConfig("base", "clip", "mllm").ip_adapter) == (None, None)


def test_commands_are_the_documented_ones():
    assert list(COMMANDS) == ["generate", "score", "dreambooth", "ablate", "point", "masks", "figures", "models", "report"]


def test_missing_data_and_weights_are_one_clear_line(tmp_path):
    with pytest.raises(SystemExit, match="evaluation generate: .*prompts_and_classes.txt is missing"):
        main(["generate", "--config", str(MINI), f"--data={tmp_path}"])
    data = write_data(tmp_path / "data")
    with pytest.raises(SystemExit, match="no/such/adapter/here"):
        main(["generate", "--config", str(MINI), f"--data={data}", "--adapter=no/such/adapter/here", f"--run={tmp_path}",
              f"--foundation.base={data}", f"--foundation.sam={data}", f"--foundation.mllm={data}", f"--decoder={data}",
              f"--foundation.ip_adapter={data}", f"--foundation.image_encoder={data}"])


def test_a_judge_that_is_not_in_the_cache_is_missed_before_the_first_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("evaluation.dreambooth.generate", lambda config: 1 / 0)
    with pytest.raises(SystemExit, match=r"(?s)evaluation dreambooth: timm/vit_small_patch14_dinov2.lvd142m@main could not be loaded.*fetch --models"):
        main(["dreambooth", "--config", str(MINI), "--overrides.extra_scores", "[dinov2]"])
    (tmp_path / "cache/models--timm--vit_small_patch14_dinov2.lvd142m/snapshots/main").mkdir(parents=True)
    with pytest.raises(ZeroDivisionError):
        main(["dreambooth", "--config", str(MINI), "--overrides.extra_scores", "[dinov2]"])


def test_a_picture_that_cannot_be_read_is_one_clear_line(tmp_path):
    data = write_data(tmp_path / "data")
    (data / "dataset/tabby/01.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match="evaluation score: .*tabby/01.png cannot be read as a picture"):
        main(["score", "--config", str(MINI), "--overrides.extra_scores=[]", "--methods={real_images: RealImages}", f"--data={data}", f"--run={tmp_path}"])


@pytest.mark.parametrize(("told", "ends"), [
    ("ValueError: an empty mask", SystemExit), ("FileNotFoundError: no model.\nFetch it: a command", SystemExit), ("ImportError: needs peft", SystemExit),
    ("RuntimeError: out of memory", ProcessRaisedException)])
def test_what_a_process_of_several_says_is_one_clear_line_too(monkeypatch, told, ends):
    def run(config):
        raise ProcessRaisedException(f"-- Process 1 terminated with the following error:\nTraceback (most recent call last):\n  File x\n{told}\n", 1, 2)

    monkeypatch.setitem(COMMANDS, "generate", run)
    with pytest.raises(ends, match=told.partition(": ")[2]):
        main(["generate", "--config", str(MINI)])


def test_the_traceback_behind_the_line_is_there_for_whoever_asks(monkeypatch, caplog):
    def run(config):
        raise ValueError("an empty mask")

    monkeypatch.setitem(COMMANDS, "generate", run)
    for level, told in (("INFO", False), ("debug", True)):
        monkeypatch.setenv("LOGLEVEL", level)
        with pytest.raises(SystemExit, match="an empty mask"):
            main(["generate", "--config", str(MINI)])
        assert ("in run\n" in caplog.text) is told


def test_no_more_processes_than_subjects_and_gpus(monkeypatch):
    assert EvalConfig("run", "data", PROTOCOL, mini_foundation(), num_processes=8, device="cpu").processes(3) == 3
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert EvalConfig("run", "data", PROTOCOL, mini_foundation(), num_processes=2, device="cuda").processes(30) == 1


def test_wandb_never_asks(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_mode() == "offline"
    (tmp_path / "netrc").write_text("machine wandb.example.org\n  login user\n  password 0000\n")  # as `wandb login` leaves it
    assert wandb_mode() == "online"
    (tmp_path / "netrc").unlink()
    for name in ("WANDB_API_KEY", "WANDB_SWEEP_ID"):  # an agent hands on the second alone
        with monkeypatch.context() as patch:
            patch.setenv(name, "0" * 40)
            assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"
