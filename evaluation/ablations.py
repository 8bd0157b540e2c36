"""The paper's Tables 3 and 4: strength of the masks and of the subject features, over the same noise."""

import logging

from evaluation import published
from evaluation.config import EvalConfig
from evaluation.dreambooth import write_json
from evaluation.generation import generate
from evaluation.methods import Method, Moma
from evaluation.plan import Evaluation
from evaluation.scoring import score
from evaluation.stamps import write_beside
from evaluation.statistics import summarise
from evaluation.tables import difference_table, method_table, protocol_line, published_table

logger = logging.getLogger(__name__)

#: Grid -> title, and the paper's rows.
GRIDS = {
    "masking": ("Masking (paper, Table 3)", published.MASKING),
    "beta": ("Subject strength beta (paper, Table 4)", published.BETA),
}


def grid(config: EvalConfig, name: str) -> dict[str, Method]:
    """Method name -> method. A setting that the main evaluation has too keeps its name there, so its pictures are shared."""
    sampler = config.resolved_protocol().sampler
    made: dict[str, Method] = {}
    for value in getattr(config.ablations, name):
        changed = {"masking": {"mask_strength": value}, "beta": {"beta": value}}[name]
        method = Moma(**({"beta": sampler.beta, "mask_strength": sampler.mask_strength} | changed))
        made[same_method(config, method) or f"moma_{name}{value:g}"] = method
    return made


def same_method(config: EvalConfig, method: Moma) -> str | None:
    """The name under which the config has this method, spelt out or left to the protocol."""
    sampler = config.resolved_protocol().sampler
    for name, known in config.methods.items():
        if isinstance(known, Moma):
            beta = sampler.beta if known.beta is None else known.beta
            strength = sampler.mask_strength if known.mask_strength is None else known.mask_strength
            if (beta, strength, known.context_scale) == (method.beta, method.mask_strength, method.context_scale):
                return name
    return None


def run_ablations(config: EvalConfig) -> None:
    """Write `<run>/ablations/{masking,beta}.{json,md}`; a grid without values is passed over and its tables stay."""
    grids = {name: grid(config, name) for name in GRIDS if getattr(config.ablations, name)}
    methods = {key: config.methods.get(key, method) for made in grids.values() for key, method in made.items()}
    generate(config, methods)
    evaluation = Evaluation.open(config)
    scores = score(evaluation, methods)
    for name, made in grids.items():
        title, paper = GRIDS[name]
        summary = summarise(scores[scores["method"].isin(made)])
        write_json(config.ablations_folder / f"{name}.json", summary)
        page = [
            f"# {title}\n",
            protocol_line(evaluation.protocol, len(evaluation.subjects)) + "\n",
            method_table(summary),
            difference_table(summary),
            f"## The paper's numbers\n\n*{published.NOTE}.*\n",
            published_table(paper, name),
        ]
        write_beside(config.ablations_folder / f"{name}.md", "\n".join(page).encode())
        logger.info("%s\n%s", title, method_table(summary))
