"""One recipe under several training seeds: what of a result is the recipe's, and what is luck.

`python -m experiments.seeds --exp mini --seeds 0 1 2` trains both stages, and stage 1 anew with each YAML of experiments/<exp>/seeds over its own
(mini's stage1-plain.yaml is the paper's stage 1), evaluates once a seed in runs/<exp>-seed<k>, and pools the scores: every method's mean is over all
seeds' pictures, intervals are over subjects. What trainings differ by is not in these: the last table has each seed's own means. Each step goes on
where it stopped. Writes runs/<exp>/seeds/{table.md, summary.json, seed<k>.json}; the JSONs say what their scores were made with, the
summary of each seed. Options that are not its own go to every `fit`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd

from evaluation.statistics import LEVEL, METRICS, above_oracle, protocols_of, summarise
from evaluation.tables import difference_table, markdown, method_table
from moma_lightning.files import write_bytes, write_json

#: Methods of seeds.yaml that use nothing the stages trained.
UNTRAINED = ("text_only", "ip_adapter", "ip_adapter_0.7", "ip_adapter_0.4")


def run(module: str, *arguments: str, threads: int | None = None) -> None:
    """`python -m module arguments`; raises CalledProcessError when it fails."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, env=environment)


def train(exp: str, seed: int, threads: int | None, extra: list[str]) -> None:
    folder = f"runs/{exp}-seed{seed}"
    shared = ["--seed_everything", str(seed), "--data.init_args.config.seed", str(seed), *extra]
    trainings = {"stage1": configs(exp, "stage1")}
    trainings |= {path.stem: [*configs(exp, "stage1"), "--config", str(path)] for path in sorted(Path(f"experiments/{exp}/seeds").glob("*.yaml"))}
    trainings["stage2"] = [*configs(exp, "stage2"), "--model.init_args.decoder", f"{folder}/stage1/image_feature_decoder"]
    for name, given in trainings.items():
        run("moma_lightning", "fit", *given, "--trainer.default_root_dir", f"{folder}/{name}", *shared, threads=threads)


def configs(exp: str, stage: str) -> list[str]:
    """The stage's YAML and, where there is one, that of two processes: what `make` gives to `fit`."""
    two = f"experiments/{exp}/two_processes/{stage}.yaml"
    return ["--config", f"experiments/{exp}/{stage}.yaml", *(["--config", two] if Path(two).is_file() else [])]


def evaluate(exp: str, seed: int, first: int) -> None:
    """By experiments/<exp>/seeds.yaml, which names seed 0's folder.

    What no training moves is taken over from the first seed's run; stamps say whether it is the same.
    """
    folder = f"runs/{exp}-seed{seed}"
    own = Path(folder) / "seeds.yaml"
    write_bytes(own, config_of(exp, folder).encode())
    for method in UNTRAINED if seed != first else ():
        made = Path(f"runs/{exp}-seed{first}/eval/pictures/{method}")
        if made.exists():
            shutil.copytree(made, f"{folder}/eval/pictures/{method}", dirs_exist_ok=True)
    run("evaluation", "dreambooth", "--config", str(own))


def config_of(exp: str, folder: str) -> str:
    """The text of experiments/<exp>/seeds.yaml for the trainings below `folder`, for a file anywhere."""
    home = Path(f"experiments/{exp}").resolve()
    text = (home / "seeds.yaml").read_text().replace(f"runs/{exp}-seed0", folder)
    return text.replace("foundation: foundation.yaml", f"foundation: {home}/foundation.yaml")


def pool(folders: list[Path]) -> pd.DataFrame:
    """The scores of all runs as if of one. What no training moves (real pictures, text alone, IP-Adapter) then counts once a run, which moves no mean."""
    return pd.concat([pd.read_parquet(folder / "eval" / "scores.parquet") for folder in folders], ignore_index=True)


def about_run(folder: Path, title: str) -> dict[str, Any]:
    """`about_table` of a run's main evaluation, as that has written it beside its scores."""
    about = json.loads((folder / "eval" / "protocol.json").read_text())
    return {"title": title, "made_with": about["made_with"], "methods": about["methods"], "sampler": about["protocol"]["sampler"]}


def write_pooled(out: Path, folders: dict[int, Path]) -> None:
    each = {seed: summarise(pool([folder])) for seed, folder in folders.items()}
    told = {seed: about_run(folder, f"Training seed {seed}") for seed, folder in folders.items()}
    for seed, summary in each.items():
        write_json(out / f"seed{seed}.json", told[seed] | summary)
    scores = pool(list(folders.values()))
    summary = summarise(scores)
    warnings = [f"**{sentence}**\n" for sentence in above_oracle(scores, summary)]
    protocol = ", ".join(f"`{name}` ({digest})" for digest, name in protocols_of(scores).items()) or "unknown"
    about = f"Protocol {protocol}. Brackets: {LEVEL:.0%} bootstrap interval over subjects, in which the trainings' own spread is not: see the last table.\n"
    title = f"Training seeds {', '.join(map(str, folders))}, pooled"
    page = [f"# {title}\n", about, *warnings, method_table(summary), difference_table(summary)]
    page += ["## Each seed's means\n", seed_table(each)]
    of_each = {key: {seed: told[seed][key] for seed in told} for key in ("made_with", "methods", "sampler")}
    write_json(out / "summary.json", {"title": title} | of_each | summary)
    write_bytes(out / "table.md", "\n".join(page).encode())
    print("\n".join(page))


def seed_table(each: dict[int, dict]) -> str:
    """A row a method: its mean under each seed."""
    methods = [name for name in next(iter(each.values())) if name != "differences"]
    columns = [metric for metric in METRICS if any(metric in summary[name] for summary in each.values() for name in methods)]
    cells = {name: [[summary[name].get(metric) for summary in each.values()] for metric in columns] for name in methods}
    rows = [[name, *(" / ".join(f"{cell['mean']:.3f}" if cell else "-" for cell in means) for means in cells[name])] for name in methods]
    return markdown([f"Seeds {', '.join(map(str, each))}", *(METRICS[metric].title for metric in columns)], rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--exp", default="mini")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--at-once", type=int, default=1, help="trainings side by side, each on its share of the cores")
    parser.add_argument("--only-train", action="store_true")
    args, fit = parser.parse_known_args(arguments)
    if not args.only_train and not Path(f"experiments/{args.exp}/seeds.yaml").is_file():
        parser.error(f"experiments/{args.exp}/seeds.yaml, by which the seeds are evaluated, is missing: write one as mini's, or give --only-train")
    threads = max(1, (os.cpu_count() or 1) // args.at_once) if args.at_once > 1 else None
    with ThreadPoolExecutor(args.at_once) as workers:
        list(workers.map(lambda seed: train(args.exp, seed, threads, fit), args.seeds))
    if args.only_train:
        return
    for seed in args.seeds:
        evaluate(args.exp, seed, args.seeds[0])
    write_pooled(Path(f"runs/{args.exp}/seeds"), {seed: Path(f"runs/{args.exp}-seed{seed}") for seed in args.seeds})


if __name__ == "__main__":
    main()
