"""The JavaScript that draws: Vega, Vega-Lite and vega-embed in one piece, which vl-convert carries."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from distprune.cache import cache_folder
from distprune.training.folder import Folder

MAKE = "import sys, vl_convert; sys.stdout.reconfigure(encoding='utf-8'); print(vl_convert.javascript_bundle())"
SECONDS = 120


def kept_at() -> Path:
    """Where the script is kept once it was bundled."""
    return cache_folder() / f"vega-{version('vl-convert-python')}.js"


def vega() -> str:
    """The script, which defines `vegaEmbed`. Bundled once for each version of vl-convert, and kept in the cache.

    Raises:
        OSError, subprocess.SubprocessError: it could not be made.
    """
    kept = kept_at()
    with suppress(OSError):
        return kept.read_text(encoding="utf-8")
    # In a process of its own: the engine that bundles takes memory and threads, which a training process keeps.
    made = subprocess.run(
        [sys.executable, "-c", MAKE], capture_output=True, text=True, encoding="utf-8", timeout=SECONDS, check=True
    )
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        Folder(kept.parent).write_text(kept.name, made.stdout)
    return made.stdout
