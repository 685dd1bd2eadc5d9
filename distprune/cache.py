"""Where what was fetched or decoded once is kept for later runs."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import constants


def cache_folder() -> Path:
    """$DISTPRUNE_CACHE, else ~/.cache/distprune."""
    return Path(os.environ.get("DISTPRUNE_CACHE") or "~/.cache/distprune").expanduser()


def is_offline() -> bool:
    """Whether nothing may be fetched: HF_HUB_OFFLINE=1, as for all that comes from the Hugging Face hub."""
    return bool(constants.HF_HUB_OFFLINE)
