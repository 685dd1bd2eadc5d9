"""The model card beside an export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from distprune import __version__
from distprune.config import dump_config
from distprune.export.source import Source

IMAGES = "images (float32, N x C x H x W, scaled to [0, 1], less the mean {mean}, by the standard deviation {std})"
LOADING = {
    "weights": """\
```python
from distprune.export import load_model

model = load_model(".")  # this folder
```
""",
    "onnx": """\
Input: {inputs}.

```python
import onnxruntime

session = onnxruntime.InferenceSession("{file}")
(logits,) = session.run(None, {feed})
```
""",
    "torch-export": """\
Input: {inputs}.

```python
import torch

model = torch.export.load("model.pt2").module()
logits = model({names})
```
""",
}


def write_card(source: Source, form: str, int8: bool, figures: Mapping[str, Any], command: str) -> str:
    """The text of README.md: how an export was made, how good it is, how it is loaded.

    Args:
        source: of the model.
        form: of the export.
        int8: whether it was quantised.
        figures: see `distprune.export.check.check`; and bytes, dense_bytes.
        command: that made it.
    """
    run, data = source.run, source.run.config.data
    environment = Environment(
        loader=PackageLoader("distprune.export", ""), undefined=StrictUndefined, trim_blocks=True, autoescape=False
    )
    texts = bool(source.names)
    return environment.get_template("card.md.jinja").render(
        library="onnx" if form == "onnx" else "pytorch",
        name=f"{run.folder.path.resolve().name}-{form.replace(':', '-')}{'-int8' if int8 else ''}",
        model=run.config.model.name,
        version=__version__,
        form=form,
        int8=int8,
        figures=figures,
        summary=run.summary,
        budget=run.summary.get("prune/budget"),
        metric=data.task != "causal_lm",
        task="text-classification" if texts else "image-classification",
        dataset=data.path or data.source,
        data=f"{data.path or data.source}, `{data.train_split}` to train on",
        split=data.eval_split,
        what="tokens" if data.task == "causal_lm" else source.held_out.what,
        loading=_loading(source, form, int8),
        command=command,
        steps=f"{run.summary['steps']:,}",
        processes=run.summary["world_size"],
        seed=run.summary["seed"],
        versions=run.summary["versions"],
        config=dump_config(run.config),
    )


def _loading(source: Source, form: str, int8: bool) -> str:
    names = source.names
    data = source.run.config.data
    most = getattr(data, "max_length", None)
    tokens = f"{most} tokens" if data.task == "causal_lm" else f"tokens, {most} at most"
    inputs = (
        f"{', '.join(names)} (int64, N x {tokens})"
        if names
        else IMAGES.format(mean=getattr(data, "mean", None), std=getattr(data, "std", None))
    )
    feed = ", ".join(f'"{name}": {name}' for name in names or ["images"])
    return LOADING.get(form, LOADING["weights"]).format(
        inputs=inputs,
        file="model.int8.onnx" if int8 else "model.onnx",
        feed=f"{{{feed}}}",
        names=", ".join(names or ["images"]),
    )
