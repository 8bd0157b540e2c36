"""Figures 4, 5 and 6, from the pictures that were scored."""

from pathlib import Path

import pandas as pd

from evaluation.config import EvalConfig
from evaluation.figures.grids import Cell, Grid, Row, spread
from evaluation.methods import Moma
from evaluation.names import column_name, column_of, method_name
from evaluation.stamps import read_stamp
from evaluation.statistics import METRICS


def own_method(config: EvalConfig, scores: pd.DataFrame) -> str | None:
    """The method that the figures of one method show: the first MoMA at the protocol's strength, else the table's last; None where nothing was generated."""
    generated = list(dict.fromkeys(scores[scores["prompt_kind"] != "real"]["method"]))
    beta = config.resolved_protocol().sampler.beta
    ours = {name: m.beta for name, m in config.methods.items() if isinstance(m, Moma) and name in generated}
    away = {name: 0.0 if strength is None else abs(strength - beta) for name, strength in ours.items()}
    return min(away, key=away.__getitem__, default=generated[-1] if generated else None)


def shown(scores: pd.DataFrame) -> pd.DataFrame:
    """One picture a prompt and subject: the first of its first reference."""
    generated = scores[scores["prompt_kind"] != "real"]
    first = generated.groupby("subject")["reference_index"].transform("first")  # a protocol may name another than number 0
    return generated[(generated["reference_index"] == first) & (generated["picture"] == 0)]


def one_method(scores: pd.DataFrame, method: str, kind: str, name: str, title: str, about: str, subjects: int = 6, prompts: int = 5) -> Grid | None:
    """Reference | prompts, a row a subject (Figures 4 and 5). None without such pictures."""
    own = shown(scores)
    own = own[(own["method"] == method) & (own["prompt_kind"] == kind)]
    rows = []
    for subject in spread(list(dict.fromkeys(own["subject"])), subjects):
        pictures = own[own["subject"] == subject]
        rows.append(Row(cells_of(pictures, prompts)))
    return Grid(name, title, about, rows, wrap=3) if rows else None


def comparison(scores: pd.DataFrame, subjects: int, prompts: int) -> Grid | None:
    """Reference | methods (Figure 6): new contexts in the upper panel, new textures in the lower, where there are any."""
    own = shown(scores)
    methods = list(dict.fromkeys(own["method"]))
    rows = []
    for kind, count in (("context", max(1, prompts - 1)), ("texture", 1)):
        for subject in spread(list(dict.fromkeys(own["subject"])), subjects):
            pictures = own[(own["subject"] == subject) & (own["prompt_kind"] == kind)]
            for index in spread(list(dict.fromkeys(pictures["prompt_index"])), count):
                same = pictures[pictures["prompt_index"] == index].set_index("method", drop=False)
                rows.append(comparison_row(same, [m for m in methods if m in same.index]))
    about = "The same noise for every method. New contexts first, then new textures of the subject itself."
    return Grid("figure6", "Comparison", about, rows, ["Reference", *map(method_name, methods)]) if rows else None


def comparison_row(same: pd.DataFrame, methods: list[str]) -> Row:
    first = same.loc[methods[0]]
    return Row([reference_cell(first, ""), *(cell_of(same.loc[m]) for m in methods)], first["prompt"])


def cells_of(pictures: pd.DataFrame, count: int) -> list[Cell]:
    """The reference, and `count` of a subject's pictures with their prompts."""
    some = [pictures.iloc[i] for i in spread(range(len(pictures)), count)]
    return [reference_cell(pictures.iloc[0]), *(cell_of(picture, caption=picture["prompt"]) for picture in some)]


def reference_cell(score: pd.Series, caption: str = "reference") -> Cell:
    return Cell("Reference", score["reference"], caption, score["subject"].replace("_", " "), "The input picture.")


def cell_of(score: pd.Series, caption: str = "") -> Cell:
    return Cell(method_name(score["method"]), score["path"], caption, score["prompt"], facts_of(score))


def facts_of(score: pd.Series) -> str:
    """Scores, then settings, a line each."""
    columns = [column for column in dict.fromkeys(map(column_of, METRICS)) if column in score.index]
    values = [f"{column_name(column)} {score[column]:.3f}" for column in columns if pd.notna(score[column])]
    return "\n".join([", ".join(values), *settings_of(Path(score["path"]))])


def settings_of(picture: Path) -> list[str]:
    """Method and sampler as the picture's stamp has them."""
    stamp = read_stamp(picture)
    if stamp is None:
        return []
    sampler, method, seed = (stamp["settings"].get(key) or {} for key in ("sampler", "method", "task"))
    own = {key: value for key, value in method.items() if value is not None}
    scheduler, steps, guidance = (own.pop(key, sampler.get(key)) for key in ("scheduler", "num_inference_steps", "guidance_scale"))
    options = ", ".join(f"{key} {value}" for key, value in own.items() if key != "kind")
    drawn = f"{scheduler or 'own scheduler'}, {steps} steps, guidance {guidance}, seed {seed.get('seed')}"
    return [f"{method.get('kind')} ({options})" if options else str(method.get("kind")), drawn]
