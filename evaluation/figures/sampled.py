"""Figures 8, 9 and 10: pictures made for the figure alone, each stamped, so that a second call makes nothing.

Subject, prompt and noise are the evaluation's own first ones, so a picture of Figures 8, 9 and 10's lower panel at the protocol's settings is the scored one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from datamodules.dreambooth import Subject
from evaluation.figures.grids import Cell, Grid, Row, spread
from evaluation.figures.scored import settings_of
from evaluation.methods import Moma
from evaluation.plan import Evaluation, Planned
from evaluation.studio import STRENGTHS, Studio, mask_path
from evaluation.tasks import PromptKind
from moma_lightning.single_file import is_single_file

BETAS = tuple(round(0.2 * i, 1) for i in range(7))
NOISES = 6
#: Figure 10's upper panel: prompts about more than the place.
SETTINGS: tuple[PromptKind, ...] = ("accessory", "pose", "camera")


def some_subjects(evaluation: Evaluation, count: int) -> list[Subject]:
    """Of different labels as far as there are any: a data set's neighbours are often of one kind."""
    one_each = list({subject.label: subject for subject in reversed(evaluation.subjects)}.values())[::-1]
    return spread(one_each if len(one_each) >= count else evaluation.subjects, count)


def cell(plan: Planned, caption: str) -> Cell:
    return Cell(f"MoMA, {caption}", str(plan.path), caption, plan.task.prompt, "\n".join(settings_of(plan.path)))


def reference(plan: Planned) -> Cell:
    return Cell("Reference", str(plan.reference.path), "reference", plan.task.subject.replace("_", " "), "The input picture.")


def beta_strip(studio: Studio, subjects: int = 3) -> Grid:
    """Figure 8: one noise, the subject features at growing strength."""
    rows = []
    for subject in some_subjects(studio.evaluation, subjects):
        cells = []
        for beta in BETAS:
            method = Moma(beta=beta)
            plan = studio.plan(f"beta{beta:g}", method, subject)
            studio.make(method, subject, [plan])
            cells.append(cell(plan, f"beta {beta:g}"))
        rows.append(Row([reference(plan), *cells], plan.task.prompt))
    return Grid("figure8", "Strength of the subject features", "One noise, beta from 0 to 1.2.", rows, wrap=4)


def masking_grid(studio: Studio) -> Grid:
    """Figure 9: six noises at three mask strengths, each picture with M_gen(0) beside it."""
    subject = next((s for s in studio.evaluation.subjects if s.is_live), studio.evaluation.subjects[0])
    rows = []
    for strength in STRENGTHS:
        name, method = f"masking{strength:g}", Moma(mask_strength=strength)
        plans = [studio.plan(name, method, subject, number) for number in range(NOISES)]
        studio.make(method, subject, plans, with_masks=True)
        cells = [one for plan in plans for one in (cell(plan, ""), mask_cell(plan))]
        rows.append(Row(cells, f"mask strength {strength:g}" if strength else "without masking"))
    prompt = plans[0].task.prompt
    about = f"“{prompt}” from six noises; right of each picture M_gen(0), where the model saw the word “{subject.label}” after the last step."
    return Grid("figure9", "Masking", about, rows, wrap=4)


def mask_cell(plan: Planned) -> Cell:
    return Cell("M_gen(0)", str(mask_path(plan.path)), "", plan.task.prompt, f"The mask read off the attention to “{plan.task.label}” after the last step.")


def settings_grid(studio: Studio, base: str | None = None, per_kind: int = 2, prompts: int = 4) -> Grid:
    """Figure 10, upper panel: what the subject wears, how it stands, how it is looked at, whatever kinds of prompt were scored.

    base: as in `community_grid`, one that knows the words of poses and camera distances; None for the foundation's own, on which accessories are
    drawn in any case.
    """
    rows = []
    chosen = some_subjects(studio.evaluation, len(SETTINGS) * per_kind)
    for number, kind in enumerate(SETTINGS):
        counts: dict[str, Any] = {f"{other}_prompts": None if other == kind else 0 for other in get_args(PromptKind)}
        protocol = replace(studio.evaluation.protocol, **counts)
        evaluation = replace(studio.evaluation, protocol=protocol, models=studio.evaluation.models.on_base(None if kind == "accessory" else base))
        here = Studio(evaluation, studio.folder)
        for subject in chosen[number :: len(SETTINGS)] or chosen[:per_kind]:
            method = Moma()
            plans = spread(here.plans("settings", method, subject), prompts)
            here.make(method, subject, plans)
            cells = [reference(plans[0]), *(cell(plan, plan.task.prompt) for plan in plans)]
            rows.append(Row(cells, kind.capitalize()))
    about = "Prompts about more than the place: what the subject wears, how it stands, how it is looked at."
    if base is not None:
        about += f" Poses and distances: the adapters as they were trained, on a fine-tune of the base that knows the words ({base_name(base)})."
    return Grid("figure10_settings", "Accessories, poses, camera", about, rows, wrap=3)


def community_grid(studio: Studio, bases: Sequence[str], subjects: int = 4) -> Grid:
    """Figure 10, lower panel: the adapters, unmodified, on other fine-tunes of the same base.

    bases: folders, files, LoRAs or hub ids of Stable Diffusion models of the training base's architecture. Full-size ones from a hub are
    not tried here.
    """
    chosen = some_subjects(studio.evaluation, subjects)
    rows = {subject.name: [] for subject in chosen}  # type: dict[str, list[Cell]]
    for number, base in enumerate((None, *bases)):
        for subject, plan in on_base(studio, base, number, chosen):
            if number == 0:
                rows[subject.name].append(replace(reference(plan), caption=""))
            rows[subject.name].append(replace(cell(plan, ""), title=base_name(base)))
    columns = ["Reference", *map(base_name, (None, *bases))]
    about = "The adapters as they were trained, on fine-tunes of the same base model."
    titled = [Row(cells, cells[1].prompt) for cells in rows.values()]
    return Grid("figure10_community", "Community checkpoints", about, titled, columns, wrap=None)


def on_base(studio: Studio, base: str | None, number: int, subjects: Sequence[Subject]) -> Iterator[tuple[Subject, Planned]]:
    """A picture of each subject with `base` in the place of the foundation's (None: that one itself)."""
    here = Studio(replace(studio.evaluation, models=studio.evaluation.models.on_base(base)), studio.folder)
    for subject in subjects:
        method = Moma()
        plan = here.plan(f"base{number}", method, subject)
        here.make(method, subject, [plan])
        yield subject, plan


def base_name(base: str | None) -> str:
    if base is None:
        return "Training base"
    name = Path(base).stem if is_single_file(base) else Path(base.partition("@")[0]).name
    return name.replace("_", " ")
