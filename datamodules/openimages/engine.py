"""Runs functions over many small items: on Ray Data, or one after the other in this process.

An item is a dictionary of short values (a unit's number, a shard's name): pictures stay in files, so memory does not grow
with the data set, and what is finished survives any crash.
"""

import functools
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moma_lightning.mendable import MENDABLE

Item = dict[str, Any]
Row = dict[str, Any]  # Ray's: an item and a pickled error, or b""
ACTOR_CORES = 0.5


@dataclass
class Stage:
    """`make(*arguments)` gives the function that every process of this stage applies to items; called once in each.

    processes: of a stage that keeps something large (a model a GPU), its own actors; None: tasks, on whatever cores are free.
    gpus: of each actor; None is one where Ray has GPUs.
    """

    make: Callable[..., Callable[[Item], Item]]
    arguments: tuple[Any, ...] = ()
    processes: int | None = None
    gpus: float | None = 0


class Engine:
    """`workers` 0 stays in this process; else Ray, at `address` or started here with `workers` cores (None: all).

    Raises ValueError for both: a cluster has the cores that it was started with.
    """

    def __init__(self, workers: int | None = 0, address: str | None = None):
        if address is not None and workers is not None:
            raise ValueError(f"run.address names a Ray cluster, which has its own cores: leave run.workers out, not {workers}")
        self.inline, self._started, self._here = workers == 0, False, address is None
        if not self.inline:
            self._started = _start_ray(workers, address)

    def run(self, items: Sequence[Item], stages: Sequence[Stage]) -> Iterator[Item]:
        """The results of the last stage, in any order. An exception in a stage stops the run."""
        if not items:
            return
        if self.inline:
            functions = [stage.make(*stage.arguments) for stage in stages]
            for item in items:
                for function in functions:
                    item = function(item)
                yield item
        else:
            yield from self._on_ray(items, stages)

    def close(self) -> None:
        if self._started:
            import ray

            ray.shutdown()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _on_ray(self, items: Sequence[Item], stages: Sequence[Stage]) -> Iterator[Item]:
        import ray
        from ray.data import ActorPoolStrategy

        if self._here:
            require_cores(ray.cluster_resources().get("CPU", 0), sum(min(stage.processes or 0, len(items)) for stage in stages))
        dataset: Any = ray.data.from_items([{"item": item, "error": b""} for item in items], override_num_blocks=len(items))
        for stage in stages:
            if stage.processes is None:
                dataset = dataset.map(_apply, fn_args=(stage.make, stage.arguments))
                continue
            gpus = (1.0 if ray.cluster_resources().get("GPU") else 0.0) if stage.gpus is None else stage.gpus
            # With whole cores, two captioners on two cores would leave none for the pictures.
            dataset = dataset.map(_Apply, fn_constructor_args=(stage.make, stage.arguments), num_gpus=gpus, num_cpus=ACTOR_CORES,
                                  compute=ActorPoolStrategy(size=min(stage.processes, len(items))))
        for row in dataset.iter_rows():
            yield _item_of(row)


def require_cores(cores: float, actors: int) -> None:
    """Raises ValueError where actors leave no core for tasks, which would then wait for ever."""
    if actors and cores < 1 + ACTOR_CORES * actors:
        raise ValueError(f"{actors} captioners take {ACTOR_CORES} of a core each and the pictures one, but Ray has {cores:g} here: "
                         "raise run.workers, lower run.captioners, or set run.workers to 0")


def _carried(row: Row, function: Callable[[Item], Item]) -> Row:
    """`function` of a row's item; in its place, where something is wrong that a person can mend, the error itself.

    It travels as a value: raised in a worker, it would come back as one of Ray's own, amid its logs and tracebacks.
    """
    if row["error"]:
        return row
    try:
        return {"item": function(row["item"]), "error": b""}
    except MENDABLE as error:
        return {"item": row["item"], "error": pickle.dumps(error)}


def _item_of(row: Row) -> Item:
    """Raises the error that a worker met, as it was."""
    if row["error"]:
        raise pickle.loads(row["error"])
    return row["item"]


_made: dict[str, Callable[[Item], Item]] = {}


def _apply(row: Row, make: Callable[..., Callable[[Item], Item]], arguments: tuple[Any, ...]) -> Row:
    """In a worker process, which lives for many tasks: open zips and connections live with it."""
    def function(item: Item) -> Item:
        name = repr((make, arguments))
        if name not in _made:
            if len(_made) > 3:  # of stages that are over
                _made.clear()
            _made[name] = make(*arguments)
        return _made[name](item)

    return _carried(row, function)


class _Apply:
    """In an actor, which keeps what `make` gave for as long as it lives."""

    def __init__(self, make: Callable[..., Callable[[Item], Item]], arguments: tuple[Any, ...]):
        self.make = functools.cache(functools.partial(make, *arguments))

    def __call__(self, row: Row) -> Row:
        return _carried(row, lambda item: self.make()(item))


def _start_ray(workers: int | None, address: str | None) -> bool:
    """Connect or start; whether it was started here. Raises ImportError that says how to install Ray."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("the data factory runs on Ray: pip install 'moma-lightning[openimages]', or set run.workers to 0") from error
    if ray.is_initialized():
        started = False
    else:
        options: dict[str, Any] = {} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(address=address or "local", logging_level=logging.WARNING, **options)  # without "local" Ray joins a cluster that it finds here
        started = True
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    return started
