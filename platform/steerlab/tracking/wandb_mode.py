"""Whether a run is sent to W&B at once: the mode of the job, and the API key."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from steerlab.job import TrackConfig

NO_KEY = "no W&B API key: set WANDB_API_KEY or run `wandb login`"
OFFLINE_REASONS = ("no W&B API key", "as the job asks")


def mode_of(track: TrackConfig) -> str:
    """Return the mode of a job's tracking: `disabled`, `online` or `offline`. Without an API key, online becomes offline."""
    wanted = track.wandb
    if wanted is None or wanted.mode == "disabled":
        return "disabled"
    return "offline" if wanted.mode == "online" and not has_key() else wanted.mode


def has_key() -> bool:
    """Return whether an API key is set, in the environment or in the netrc file where `wandb login` stores it."""
    # W&B's client has a function for this, but takes 0.2 s to import and caches its first answer.
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        return host is not None and netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
