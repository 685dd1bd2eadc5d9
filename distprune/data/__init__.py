"""Data: sources, decoded storage, transforms, and loaders whose samples do not depend on the number of ranks."""

from distprune.data.loader import PADDING, eval_loader, normalize, train_loader
from distprune.data.sampler import Order
from distprune.data.sources import ImageData, load_images

__all__ = ["PADDING", "ImageData", "Order", "eval_loader", "load_images", "normalize", "train_loader"]
