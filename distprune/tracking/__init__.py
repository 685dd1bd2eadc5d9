"""Where figures go: metrics.jsonl, the terminal, Weights & Biases. Each takes the same rows."""

from distprune.tracking.progress import Progress
from distprune.tracking.tracker import BINS, Histogram, JsonLines, Row, Tracker, Trackers, read_histograms

__all__ = ["BINS", "Histogram", "JsonLines", "Progress", "Row", "Tracker", "Trackers", "read_histograms"]
