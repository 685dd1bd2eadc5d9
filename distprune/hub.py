"""What is loaded with Hugging Face's transformers, from its hub or a folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from distprune.errors import ConfigError, MissingError, reason


@contextmanager
def loading(key: str, name: str) -> Iterator[None]:
    """Where something of transformers is loaded, quietly; what goes wrong is told once.

    Raises:
        ConfigError: transformers is missing, or what the setting `key` names cannot be loaded.
        MissingError: it is neither a folder nor in the cache, and cannot be fetched from here.
    """
    try:
        from transformers.utils import logging
    except ImportError:
        raise ConfigError(f"{key}: {name} needs transformers; pip install 'distprune[transformers]'") from None
    if not Path(name).is_dir() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise ConfigError(f"{key}: {name}: no such folder")
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        said = re.sub(r"\s+", " ", f"{'no ' if isinstance(error, KeyError) else ''}{reason(error)}")
        unreachable = isinstance(error, OSError) and "connect" in said
        raise (MissingError if unreachable else ConfigError)(f"{key}: cannot load {name}: {said}") from error
    finally:
        logging.set_verbosity(verbosity)
