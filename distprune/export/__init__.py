"""Models in forms that others run: `distprune export`."""

from distprune.export.loading import load_model
from distprune.models.packed import load_packed, save_packed

__all__ = ["load_model", "load_packed", "save_packed"]
