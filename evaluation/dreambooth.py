"""DreamBooth-style evaluation from pictures to table: scores.parquet, summary.json, table.md, protocol.json."""

import io
import json
import logging
import warnings
from dataclasses import asdict

import pandas as pd

from evaluation.config import EvalConfig
from evaluation.generation import generate
from evaluation.plan import Evaluation
from evaluation.scoring import score
from evaluation.stamps import git_revision, write_beside
from evaluation.statistics import above_oracle, summarise
from evaluation.tables import method_table, score_page

logger = logging.getLogger(__name__)


def run_scoring(config: EvalConfig) -> pd.DataFrame:
    """Score what was generated and write the tables below `<run>/eval`."""
    evaluation = Evaluation.open(config)
    scores = score(evaluation, config.methods)
    write_tables(evaluation, scores)
    return scores


def write_tables(evaluation: Evaluation, scores: pd.DataFrame) -> None:
    folder, protocol = evaluation.config.eval_folder, evaluation.protocol
    summary = summarise(scores)
    found = above_oracle(scores, summary)
    for sentence in found:
        warnings.warn(sentence, stacklevel=2)
    buffer = io.BytesIO()
    scores.to_parquet(buffer, index=False)
    write_beside(folder / "scores.parquet", buffer.getvalue())
    write_json(folder / "summary.json", summary)
    about = {"digest": protocol.digest, "git_revision": git_revision(), "warnings": found, "protocol": asdict(protocol)}
    write_json(folder / "protocol.json", about)
    write_beside(folder / "table.md", score_page(summary, protocol, len(evaluation.subjects), found).encode())
    logger.info("%s\n%s", folder / "table.md", method_table(summary))


def write_json(path, content) -> None:
    write_beside(path, (json.dumps(content, indent=1) + "\n").encode())


def run_dreambooth(config: EvalConfig) -> None:
    """Generate what is missing, then score everything."""
    generate(config)
    run_scoring(config)
