"""What scores were made with: two tables stand side by side only where it is the same."""

from functools import cache
from typing import Any

from evaluation.config import EvalConfig
from evaluation.extra_scores import NEEDS_MASKS
from evaluation.protocols import Protocol
from moma_lightning.digests import content_digest, identity
from moma_lightning.hub import local_path


def made_with(config: EvalConfig) -> dict[str, Any]:
    """Digests of the protocol, of what judges and of what draws; a model of the hub is its name and revision, one that is not there None."""
    drawing = {name: getattr(config.foundation, name) for name in ("base", "vae", "image_encoder", "mllm", "ip_adapter")}
    drawing |= {"adapter": config.adapter, "decoder": config.decoder}
    protocol = config.resolved_protocol()
    drawn_with = {name: known_identity(path) for name, path in drawing.items()}
    return {"protocol": protocol.digest, "dtype": config.dtype, **drawn_with, "judges": weights_of(protocol)}


@cache
def known_identity(path: str | None) -> str | None:
    """None for weights that no method needs: those that one needs, and are not there, are an error elsewhere."""
    try:
        return None if path is None else identity(path)
    except FileNotFoundError:
        return None


def weights_of(protocol: Protocol) -> dict[str, str]:
    """The judges: the digest of a local folder's files, or the model's name and revision."""
    models: dict[str, tuple[str, str | None]] = {name: (config.model, config.revision) for name, config in protocol.encoders.items()}
    if not NEEDS_MASKS.isdisjoint(protocol.extra_scores):
        models["segmenter"] = (protocol.segmenter, None)
    hub = {name: f"{model}@{revision}" if revision else model for name, (model, revision) in models.items()}
    return {name: content_digest(found) if (found := local_path(model)) else hub[name] for name, (model, _) in models.items()}
