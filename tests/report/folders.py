"""What other commands write into a run folder, small and by their contract, to show in a report."""

import json
import math


def add_analysis(folder, layers):
    """analysis.json, as `distprune analyze` writes it; its layers are modules."""
    latency = [
        {
            "form": form,
            "device": "cpu",
            "threads": 2,
            "batch": batch,
            "median_ms": batch * factor,
            "low_ms": batch * factor * 0.9,
            "high_ms": batch * factor * 1.2,
            "samples_per_s": 1000 / factor,
            "peak_bytes": None,
        }
        for batch in (1, 64)
        for form, factor in (("dense", 0.21), ("masked", 0.21), ("shrunk", 0.11), ("onnx", 0.14))
    ]
    content = {
        "machine": {"cpu": "Xeon <2 GHz>", "threads": 2, "gpu": None, "torch": "2.15.0"},
        "layers": {
            name.removesuffix(".weight"): {
                "shape": [2, 3],
                "weights": 6,
                "zeros": 3,
                "macs": 1000 * (i + 1),
                "effective_macs": 300 * (i + 1),
            }
            for i, name in enumerate(layers)
        },
        "totals": {
            form: {"parameters": 38330, "nonzero": left, "macs": 337536, "effective_macs": left * 9}
            for form, left in (("dense", 38330), ("pruned", 3986))
        },
        "sizes": {"dense": 154880, "pruned": 154880, "pruned zipped": 24310, "packed": 21010},
        "latency": latency,
        "words": ["Packed, the weights take 14 % of the dense size.", "Dense kernels gain nothing from zeros."],
    }
    (folder / "analysis.json").write_text(json.dumps(content), encoding="utf-8")


def add_validation(folder, classes=10):
    """validation.json, as `distprune validate` writes it; a class is named so that it must be escaped."""

    def one(dense, pruned, classes=()):
        forms = {"dense": {"top1": dense, "loss": 0.1}, "pruned": {"top1": pruned, "loss": math.nan}}
        return {"samples": 360, **forms, "classes": list(classes), "agree": 350, "lost": 7, "gained": 3}

    of_classes = [
        {"name": f"class {i}" if i else "<b>zero</b>", "samples": 36, "dense": 99.0, "pruned": 99.5 - 0.7 * i}
        for i in range(classes)
    ]
    kinds = ("noise", "blur", "brightness", "contrast", "jpeg")
    sets = {"eval": one(99.44, 98.89, of_classes), "shifted": one(90.0, 85.25)}
    sets |= {
        f"{kind}-{strength}": one(99 - 7 * strength - i, 99 - 9 * strength - 2 * i)
        for i, kind in enumerate(kinds)
        for strength in (1, 2, 3)
    }
    (folder / "validation.json").write_text(json.dumps({"sets": sets}), encoding="utf-8")


def add_exports(folder):
    """export/<format>/, as `distprune export` leaves it."""
    for name, size in (("packed", 21010), ("onnx", 155000)):
        place = folder / "export" / name
        place.mkdir(parents=True)
        (place / f"model.{name}").write_bytes(bytes(size))
        (place / "README.md").write_text("# A model\n", encoding="utf-8")
        (place / "figures.json").write_text(json.dumps({"bytes": size, "top1": 98.89}), encoding="utf-8")


def add_histograms(folder, layers):
    """histograms.jsonl, a line for each update."""
    lines = [
        {
            "trainer/step": step,
            "layers": {
                name: {"limit": 0.5, "counts": [left * (i % 32) for i in range(64)], "zeros": 64 - left}
                for name in layers
            },
        }
        for step, left in ((660, 40), (670, 30), (1100, 7))
    ]
    (folder / "histograms.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def add_rounds(folder):
    """Attempts at rounds, two of which were rolled back, in the summary."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    accepted = (True, True, False, True, False)
    summary["prune/rounds"] = [
        {"round": i + 1, "sparsity": 1 - 0.6 ** (i + 1), "top1": 99.0 - i, "drop": 0.4 + i, "accepted": yes}
        for i, yes in enumerate(accepted)
    ]
    summary["prune/guard"] = {"max_drop": 1.0, "min_step": 0.1, "set": None}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
