"""Tables of settings over the same noise: the paper's Tables 3 and 4 and further axes, one YAML each (experiments/ablations)."""

import logging

from lightning.pytorch.utilities import rank_zero_only

from evaluation import published
from evaluation.config import EvalConfig
from evaluation.generation import generate
from evaluation.made_with import about_table
from evaluation.plan import Evaluation
from evaluation.protocols import preset
from evaluation.scoring import score
from evaluation.shared_scoring import fill_caches
from evaluation.statistics import summarise
from evaluation.tables import difference_table, method_table, protocol_line, published_table
from moma_lightning.files import write_bytes, write_json

logger = logging.getLogger(__name__)


def run_ablation(config: EvalConfig) -> dict:
    """Write `<run>/ablations/<name>.{json,md}` and return the summary (under torchrun rank 0 does). Raises ValueError without a named ablation."""
    ablation = config.ablation
    if ablation.name is None or not ablation.methods:
        raise ValueError("no ablation is configured: add --config experiments/ablations/<axis>.yaml after the evaluation's own")
    generate(config, ablation.methods)
    fill_caches(config, ablation.methods)
    if rank_zero_only.rank:
        return {}
    evaluation = Evaluation.open(config)
    summary = summarise(score(evaluation, ablation.methods))
    title = ablation.title or ablation.name
    page = [f"# {title}\n", protocol_line(evaluation.protocol, preset(config.protocol), len(evaluation.subjects)) + "\n", method_table(summary)]
    if summary["differences"]:
        page.append(difference_table(summary))
    if ablation.published is not None:
        page += [f"## The paper's numbers\n\n*{published.NOTE}.*\n", published_table(published.ABLATIONS[ablation.published], ablation.published)]
    about = about_table(config, title, ablation.methods) | {"published": ablation.published}
    write_json(config.ablations_folder / f"{ablation.name}.json", about | summary)
    write_bytes(config.ablations_folder / f"{ablation.name}.md", "\n".join(page).encode())
    logger.info("%s\n%s", title, method_table(summary))
    return summary
