"""Data: sources, decoded storage, transforms, and loaders whose samples do not depend on the number of ranks."""

from distprune.data.images import ImageData, load_images
from distprune.data.loader import PADDING, Batch, ImageSamples, Inputs, Samples, eval_loader, normalize, train_loader
from distprune.data.sampler import Order
from distprune.data.texts import Blocks, LabelledTexts, load_texts, load_tokenizer

__all__ = [
    "PADDING",
    "Batch",
    "Blocks",
    "ImageData",
    "ImageSamples",
    "Inputs",
    "LabelledTexts",
    "Order",
    "Samples",
    "eval_loader",
    "load_images",
    "load_texts",
    "load_tokenizer",
    "normalize",
    "train_loader",
]
