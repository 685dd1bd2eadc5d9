"""Where figures go: metrics.jsonl, the terminal, Weights & Biases. Each takes the same rows."""

from distprune.tracking.progress import Progress
from distprune.tracking.tracker import JsonLines, Row, Tracker, Trackers

__all__ = ["JsonLines", "Progress", "Row", "Tracker", "Trackers"]
