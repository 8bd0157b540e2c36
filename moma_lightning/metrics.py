"""Validation's scores over all ranks: a mean of which each sample is one part, and how well predicted image embeddings match the true ones."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class SampleMean(Metric):
    """Mean over samples, of batches' means. Lists, since torchmetrics' MeanMetric cannot be built by the planner, whose tensors hold nothing."""

    full_state_update = False
    mean: list[Tensor]
    count: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("mean", default=[], dist_reduce_fx="cat")
        self.add_state("count", default=[], dist_reduce_fx="cat")

    def update(self, mean: Float[Tensor, ""], count: int) -> None:
        self.mean.append(mean.detach().float())
        self.count.append(torch.tensor(count, device=mean.device))

    def compute(self) -> Tensor:
        mean, count = dim_zero_cat(self.mean), dim_zero_cat(self.count)
        require_samples(int(count.sum()))
        return (mean * count).sum() / count.sum()


class EmbeddingMatch(Metric):
    """Mean cosine similarity, and retrieval R@1: how often an embedding's nearest among `pool` true ones is its own.

    The cosine is in [-1, 1], R@1 in [0, 1], over all ranks, and the same on any number of them. R@1 is the mean over whole pools of consecutive
    samples of different true embeddings, the first of each, since several subjects may share a picture. With fewer than one pool, all of them are
    the pool. A prediction of zeros, as near to all, is never the nearest to its own.
    """

    full_state_update = False
    predicted: list[Tensor]
    target: list[Tensor]
    number: list[Tensor]

    def __init__(self, pool: int = 256):
        super().__init__()
        self.pool = pool
        self.add_state("predicted", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")
        self.add_state("number", default=[], dist_reduce_fx="cat")

    def update(self, predicted: Float[Tensor, "batch embed_dim"], target: Float[Tensor, "batch embed_dim"], number: int) -> None:
        """number: the batch's, over all ranks, which puts samples into an order."""
        self.predicted.append(F.normalize(predicted.detach().float(), dim=-1))
        self.target.append(F.normalize(target.detach().float(), dim=-1))
        self.number.append(torch.full((len(target),), number, device=target.device))

    def compute(self) -> dict[str, Tensor]:
        order = dim_zero_cat(self.number).argsort(stable=True)
        predicted, target = dim_zero_cat(self.predicted)[order], dim_zero_cat(self.target)[order]
        require_samples(len(target))
        return {"cosine": (predicted * target).sum(-1).mean(), "r_at_1": self._recall(predicted, target)}

    def _recall(self, predicted: Tensor, target: Tensor) -> Tensor:
        kept = first_of_each(target)
        predicted, target = predicted[kept], target[kept]
        pool = min(self.pool, len(target))
        hits = []
        for start in range(0, len(target) - pool + 1, pool):
            similarity = predicted[start : start + pool] @ target[start : start + pool].T
            hits.append((similarity.diagonal() >= similarity.max(1).values - 1e-6) & predicted[start : start + pool].any(1))
        return torch.cat(hits).float().mean()


def require_samples(count: int) -> None:
    if not count:
        raise ValueError("no sample of the validation counts, since all that its batches hold are bad: the log of bad samples (data.config.bad_samples) names "
                         "them; mend these shards, or let data.config.val_batches reach others")


def first_of_each(rows: Float[Tensor, "rows dim"]) -> Int[Tensor, " different_rows"]:
    """Places of the rows that no row before them equals, in order."""
    different, which = torch.unique(rows, dim=0, return_inverse=True)
    places = torch.arange(len(rows), device=rows.device)
    return torch.full((len(different),), len(rows), device=rows.device).scatter_reduce(0, which, places, "amin").sort().values
