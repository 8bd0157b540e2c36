"""Whether wandb's server is there for a run, without asking anybody."""

import os
from typing import Any

import wandb
from requests.utils import get_netrc_auth


def wandb_mode() -> Any:
    """WANDB_MODE where it is set; else "online" under a sweep's agent and where a key is known, "offline" elsewhere.

    A key is WANDB_API_KEY or what `wandb login` wrote to netrc. wandb's own look-up also asks the server whether the key is good.
    """
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    server = os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url
    has_key = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_SWEEP_ID") or get_netrc_auth(server) is not None
    return "online" if has_key else "offline"


def wandb_project() -> str:
    """WANDB_PROJECT where it is set, else this package's name."""
    return os.environ.get("WANDB_PROJECT") or "moma-lightning"
