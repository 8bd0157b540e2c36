"""What scores were made with: two tables stand side by side only where it is the same."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

from evaluation.config import EvalConfig
from evaluation.extra_scores import NEEDS_MASKS
from evaluation.methods import Method
from evaluation.metrics.configs import name_of
from evaluation.protocols import Protocol
from moma_lightning.digests import at_commit, content_digest, identity, same_identity
from moma_lightning.hub import cached_commit, local_path


def about_table(config: EvalConfig, title: str, methods: Mapping[str, Method]) -> dict[str, Any]:
    """What a table's JSON file says beside its numbers: `made_with`, and the options of what drew."""
    return {"title": title, "made_with": made_with(config, methods.values()), "methods": options_of(methods),
            "sampler": asdict(config.resolved_protocol().sampler)}


def made_with(config: EvalConfig, methods: Iterable[Method] = ()) -> dict[str, Any]:
    """Digests of the protocol, of the data, of what judges and of what draws (`identity`); None for a model that is not there.

    Of judges it is `weights_of`.

    methods: `others` holds what they read beside the config's own, by path.
    """
    foundation, protocol = config.foundation, config.resolved_protocol()
    drawing = {name: getattr(foundation, name) for name in ("base", "base_config", "vae", "image_encoder", "mllm", "ip_adapter", "sam")}
    drawing |= {"adapter": config.adapter, "decoder": config.decoder, "data": config.data}
    drawn_with = {name: known_identity(path) for name, path in drawing.items()}
    precision = {"dtype": config.dtype, "mllm_dtype": foundation.mllm_dtype, "mllm_quantization": foundation.mllm_quantization}
    others = {path for method in methods for name in ("base", "adapter", "decoder") if (path := getattr(method, name, None))}
    return {"protocol": protocol.digest, **precision, **drawn_with, "judges": weights_of(protocol), "others": {path: known_identity(path) for path in others}}


def changed_since(before: Mapping[str, Any], config: EvalConfig) -> list[str]:
    """Names of what is another now than `made_with` said it was."""
    now = made_with(config) | {"others": {path: known_identity(path) for path in before.get("others", {})}}
    return [name for name in now if not same_identity(before.get(name), now[name])]


def options_of(methods: Mapping[str, Method]) -> dict[str, Any]:
    """Every method's options as a JSON file gives them back."""
    return json.loads(json.dumps({name: method.options() for name, method in methods.items()}, default=str))


@cache
def known_identity(path: str | None) -> str | None:
    """None for weights that no method needs: those that one needs, and are not there, are an error elsewhere."""
    try:
        return None if path is None else identity(path)
    except FileNotFoundError:
        return None


def weights_of(protocol: Protocol) -> dict[str, str]:
    """The judges, each as `weights_at` tells it."""
    models = {name: name_of(config) for name, config in protocol.encoders.items()}
    if not NEEDS_MASKS.isdisjoint(protocol.extra_scores):
        models["segmenter"] = protocol.segmenter
    return {name: weights_at(model) for name, model in models.items()}


def weights_at(model: str) -> str:
    """The digest of a local folder's files, or the hub's name and commit; of a branch, the one that is in the cache."""
    return content_digest(found) if (found := local_path(model)) else at_commit(model, cached_commit(model))
