"""What is wrong with a file ends a build on Ray as it does without: with the same error. Ray itself is not started here."""

import pickle

import pytest

from datamodules.openimages import engine
from datamodules.openimages.fetch import UnreachableError
from datamodules.openimages.tables import SplitTable


def row(**item) -> dict:
    return {"item": item, "error": b""}


class Doubled:
    def __init__(self, error: Exception | None = None):
        self.error = error

    def __call__(self, item):
        if self.error:
            raise self.error
        return item | {"double": 2 * item["number"]}


@pytest.mark.parametrize("apply", [engine._apply, lambda given, make, arguments: engine._Apply(make, arguments)(given)])
def test_a_result_and_an_error_travel_as_values(apply):
    assert engine._item_of(apply(row(number=3), Doubled, ())) == {"number": 3, "double": 6}
    for error in (ValueError("a.csv lacks the columns ['ImageID']"), FileNotFoundError("b.csv is missing"), UnreachableError("c: HTTP 503")):
        failed = apply(row(number=3), Doubled, (error,))
        assert apply(failed, Doubled, ()) is failed, "later stages leave it alone"
        with pytest.raises(type(error)) as raised:
            engine._item_of(failed)
        assert str(raised.value) == str(error)
    with pytest.raises(ZeroDivisionError):  # a mistake in the program keeps its traceback, Ray's
        apply(row(number=3), Doubled, (ZeroDivisionError(),))


@pytest.mark.parametrize("apply", [engine._apply, lambda given, make, arguments: engine._Apply(make, arguments)(given)])
def test_a_stage_that_cannot_be_made_says_so_too(apply):
    def make():
        raise ImportError("pip install 'moma-lightning[openimages]'")

    with pytest.raises(ImportError, match="pip install"):
        engine._item_of(apply(row(number=3), make, ()))


def test_captioners_that_leave_no_core_are_refused_and_not_waited_for():
    for cores, actors in ((1, 1), (2, 3), (8, 16)):
        with pytest.raises(ValueError, match="raise run.workers, lower run.captioners"):
            engine.require_cores(cores, actors)
    for cores, actors in ((1, 0), (2, 1), (2, 2), (9, 16)):
        engine.require_cores(cores, actors)


@pytest.mark.parametrize("workers", [0, 3])
def test_a_cluster_has_its_own_cores(workers):
    with pytest.raises(ValueError, match=f"run.address names a Ray cluster.* leave run.workers out, not {workers}"):
        engine.Engine(workers, "auto")


def test_an_actor_makes_its_function_once():
    made = []
    actor = engine._Apply(lambda: made.append(1) or Doubled(), ())
    assert [engine._item_of(actor(row(number=n)))["double"] for n in (1, 2)] == [2, 4] and made == [1]


def test_a_bad_csv_is_named(plain_bucket, config_of, tmp_path):
    config = config_of(plain_bucket)
    bad = tmp_path / "bad"
    (bad / "v5").mkdir(parents=True)
    (bad / "v5/train-annotations-object-segmentation.csv").write_text("MaskPath,LabelName\na.png,/m/01\n")
    config.sources.annotations = str(bad)
    failed = engine._apply(row(kind="masks"), SplitTable, (config.sources, "train", tmp_path / "cache", tmp_path / "tables"))
    assert isinstance(pickle.loads(failed["error"]), ValueError)
    with pytest.raises(ValueError, match=r"object-segmentation.csv lacks the columns \['ImageID'"):
        engine._item_of(failed)
