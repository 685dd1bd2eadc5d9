"""Models: small reference networks, and one registry for all that can be named in a configuration."""

from distprune.models.registry import build_model
from distprune.models.weights import load_weights

__all__ = ["build_model", "load_weights"]
