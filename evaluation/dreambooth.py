"""DreamBooth-style evaluation from pictures to table: scores.parquet, summary.json, table.md, per_{subject,prompt}.csv, protocol.json."""

import io
import logging
import warnings
from dataclasses import asdict
from typing import Literal

import pandas as pd
from lightning.pytorch.utilities import rank_zero_only

from evaluation.config import EvalConfig
from evaluation.extra_scores import NEEDS_MASKS
from evaluation.generation import generate
from evaluation.made_with import made_with, options_of
from evaluation.metrics.configs import hub_names
from evaluation.oracle import check_oracle, incomplete, single
from evaluation.plan import Evaluation
from evaluation.protocols import preset
from evaluation.scoring import score
from evaluation.shared_scoring import fill_caches
from evaluation.stamps import git_revision
from evaluation.statistics import METRICS, Interval, above_oracle, prompt_intervals, subject_means, summarise
from evaluation.tables import method_table, score_page
from moma_lightning.files import write_bytes, write_json
from moma_lightning.hub import require_cached

logger = logging.getLogger(__name__)


def run_scoring(config: EvalConfig) -> pd.DataFrame | None:
    """Score what was generated and write the tables below `<run>/eval`; under torchrun rank 0 does, the others return None."""
    fill_caches(config, config.methods)
    if rank_zero_only.rank:
        return None
    evaluation = Evaluation.open(config)
    scores = score(evaluation, config.methods)
    write_tables(evaluation, scores)
    return scores


def write_tables(evaluation: Evaluation, scores: pd.DataFrame) -> None:
    folder, protocol = evaluation.config.eval_folder, evaluation.protocol
    summary = summarise(scores)
    subjects = evaluation.subjects
    found = incomplete(evaluation.data, protocol) + check_oracle(scores, protocol, len(subjects)) + single(scores, subjects) + above_oracle(scores, summary)
    for sentence in found:
        warnings.warn(sentence, stacklevel=2)
    buffer = io.BytesIO()
    scores.to_parquet(buffer, index=False)
    write_bytes(folder / "scores.parquet", buffer.getvalue())
    write_json(folder / "summary.json", summary)
    for by in ("subject", "prompt"):
        write_bytes(folder / f"per_{by}.csv", breakdowns(scores, by).to_csv(index=False, float_format="%.6f").encode())
    config = evaluation.config
    about = {"digest": protocol.digest, "git_revision": git_revision(), "warnings": found, "made_with": made_with(config, config.methods.values())}
    about |= {"methods": options_of(config.methods), "protocol": asdict(protocol)}
    write_json(folder / "protocol.json", about)
    write_bytes(folder / "table.md", score_page(summary, protocol, preset(config.protocol), len(subjects), found).encode())
    logger.info("%s\n%s", folder / "table.md", method_table(summary))


def breakdowns(scores: pd.DataFrame, by: Literal["subject", "prompt"]) -> pd.DataFrame:
    """Columns metric, subject or prompt, then a method each; a block of rows a metric. Prompts have the ends of every mean's interval besides,
    `<method>_lo` and `<method>_hi`: intervals are over subjects, so that a single subject has none.
    """
    frames = {metric: subject_means(scores, metric) if by == "subject" else prompt_means(scores, metric) for metric in METRICS}
    first = pd.DataFrame(columns=["metric", by])
    return pd.concat([first, *(frame.reset_index(names=by).assign(metric=metric) for metric, frame in frames.items() if not frame.empty)])


def prompt_means(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    found = prompt_intervals(scores, metric)
    methods = list(dict.fromkeys(method for cells in found.values() for method in cells))
    named = [(method, method, "mean") for method in methods] + [(f"{method}_{end}", method, end) for method in methods for end in ("lo", "hi")]

    def value(cell: Interval, key: str) -> float:
        return cell[key] if key == "mean" or cell["lo"] < cell["hi"] else float("nan")

    return pd.DataFrame({name: {form: value(cells[method], key) for form, cells in found.items() if method in cells} for name, method, key in named})


def run_dreambooth(config: EvalConfig) -> None:
    """Generate what is missing, then score everything. Raises FileNotFoundError before the first picture where a judge is missing."""
    protocol = config.resolved_protocol()
    segmenter = [] if NEEDS_MASKS.isdisjoint(protocol.extra_scores) else [protocol.segmenter]
    for name in [*hub_names(protocol.encoders.values()), *segmenter]:
        require_cached(name)
    generate(config)
    run_scoring(config)
