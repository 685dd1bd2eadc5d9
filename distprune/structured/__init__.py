"""Structured pruning: whole channels and attention heads, at 0 first and then physically gone."""

from distprune.structured.channels import ChannelGroup, Channels
from distprune.structured.find import find_channels
from distprune.structured.penalty import GroupPenalty
from distprune.structured.pruner import ChannelPruner
from distprune.structured.shrink import kept_of, layout, shrink_like

__all__ = [
    "ChannelGroup",
    "ChannelPruner",
    "Channels",
    "GroupPenalty",
    "find_channels",
    "kept_of",
    "layout",
    "shrink_like",
]
