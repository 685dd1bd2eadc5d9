"""ONNX: the graph of a model, with any number of samples, run by ONNX Runtime; and its static quantisation to int8."""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distprune.data import Inputs
from distprune.errors import ConfigError, reason
from distprune.export.source import Logits, Source

OPSET = 18
LARGEST = 1_800_000_000
"""Bytes of weights that one file may hold; others lie beside it."""
BIAS_STEPS = 1 << 15
"""See `refine_biases`."""


def need() -> None:
    """Refuse to go on without the packages.

    Raises:
        ConfigError: says what to install.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--format: onnx needs {error.name}; pip install 'distprune[export]'") from None


def write_onnx(source: Source, folder: Path) -> Path:
    """Write model.onnx.

    Raises:
        ConfigError: torch cannot trace the model.
    """
    need()
    path = folder / "model.onnx"
    names = source.names or ["images"]
    weights = sum(value.numel() * value.element_size() for value in source.model.state_dict().values())
    with quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                Logits(source.model, source.names).eval(), source.values(source.held_out.first_inputs()),
                input_names=names, output_names=["logits"], opset_version=OPSET, dynamo=True,
                dynamic_shapes=(source.dynamic(),), verbose=False,
            )  # fmt: skip
        except Exception as error:  # whatever a tracer meets
            raise ConfigError(f"--format: {_name(source)} cannot be traced to ONNX: {reason(error)}") from error
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # lines of code on this machine
    program.save(path, external_data=weights > LARGEST)
    return path


def quantize(source: Source, path: Path, samples: int) -> Path:
    """Write model.int8.onnx beside model.onnx: weights and activations in 8 bits, weights symmetric by channel, so that
    zeros stay zeros. Weights take 7 of their bits: of two products of 8 bits the sum does not fit into the 16 bits in
    which processors without VNNI add them up, and would be cut off there.

    Args:
        source: of the model.
        path: of model.onnx.
        samples: of the training split, drawn by run.seed, by which the ranges of activations are set.

    Raises:
        ConfigError: ONNX Runtime cannot quantise the graph, or a zero would not stay one.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    out, beside = path.with_name("model.int8.onnx"), path.with_name(f"{path.name}.data").exists()
    with tempfile.TemporaryDirectory() as scratch, quiet():
        prepared = Path(scratch, "prepared.onnx")
        try:
            quant_pre_process(
                path, prepared, skip_symbolic_shape=True, save_as_external_data=beside, all_tensors_to_one_file=beside
            )
            quantize_static(
                prepared, out, _Calibration(source, samples), quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, reduce_range=True,
                calibrate_method=CalibrationMethod.MinMax, use_external_data_format=beside,
                extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
            )  # fmt: skip
        except Exception as error:  # whatever a quantiser meets
            raise ConfigError(f"--quantize: ONNX Runtime cannot quantise the model: {reason(error)}") from error
        refine_biases(prepared, out)
        if lost := lost_zeros(prepared, out):
            raise ConfigError(f"--quantize: zeros of {', '.join(lost)} would be others in int8; nothing was written")
    return out


def refine_biases(path: Path, quantized: Path) -> None:
    """Store the biases of outputs whose weights are all zero in a quantised graph as finely as others.

    A bias counts in steps of the scale of activations times that of weights, and ONNX Runtime gives weights that are
    all zero a scale of 1. Any does for them, so they get one by which the bias is 2^15 steps.

    Args:
        path: of the graph before.
        quantized: of the graph, which is replaced.
    """
    import onnx
    from onnx import numpy_helper

    before = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    model = onnx.load(quantized)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    made = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    uses = Counter(name for node in model.graph.node for name in node.input)
    changed = False
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3:
            continue
        weight, bias = made.get(node.input[1]), made.get(node.input[2])
        if weight is None or bias is None or not {*weight.input, *bias.input} <= stored.keys():
            continue
        name = bias.input[0].removesuffix("_quantized")
        scales = weight.input[1], bias.input[1]
        if name not in before or any(uses[used] > 1 for used in (weight.output[0], bias.output[0], *scales)):
            continue
        values, of_weights, of_biases, steps, exact = (
            numpy_helper.to_array(tensor).copy()
            for tensor in (*(stored[used] for used in (weight.input[0], *scales, bias.input[0])), before[name])
        )
        axis = next((found.i for found in weight.attribute if found.name == "axis"), 0)
        if not of_weights.shape == of_biases.shape == exact.shape == (values.shape[axis],):
            continue
        dead = ~np.moveaxis(values, axis, 0).reshape(len(exact), -1).any(1) & (exact != 0)
        if not dead.any():
            continue
        of_activations = of_biases[dead] / of_weights[dead]
        of_biases[dead] = np.abs(exact[dead]) / BIAS_STEPS
        of_weights[dead] = of_biases[dead] / of_activations
        steps[dead] = np.sign(exact[dead]) * BIAS_STEPS
        for used, array in zip((*scales, bias.input[0]), (of_weights, of_biases, steps), strict=True):
            stored[used].CopyFrom(numpy_helper.from_array(array, used))
        changed = True
    if changed:
        beside = quantized.with_name(f"{quantized.name}.data")
        external = beside.exists()
        beside.unlink(missing_ok=True)
        onnx.save(model, quantized, save_as_external_data=external, location=beside.name)


def lost_zeros(path: Path, quantized: Path) -> list[str]:
    """Names of weights of a graph of which a zero is none in its quantised form."""
    import onnx
    from onnx import numpy_helper

    before = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    graph = onnx.load(quantized).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    lost = []
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or not {node.input[0], node.input[2]} <= stored.keys():
            continue
        name = node.input[0].removesuffix("_quantized")
        values, zero = (numpy_helper.to_array(stored[node.input[place]]) for place in (0, 2))
        if name not in before or values.dtype != np.int8:
            continue  # a bias, in 32 bits
        axis = next((found.i for found in node.attribute if found.name == "axis"), 0)
        zero = zero.reshape([-1 if zero.size > 1 and dim == axis else 1 for dim in range(values.ndim)])
        if np.any((values != zero) & (numpy_helper.to_array(before[name]) == 0)):
            lost.append(name)
    return lost


class Session:
    """A model in ONNX Runtime, on the CPU.

    Args:
        path: of the .onnx file.
        threads: that compute; as many as torch has.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._names = [taken.name for taken in self._session.get_inputs()]

    def __call__(self, inputs: Inputs) -> Tensor:
        """Logits, float32."""
        values = {self._names[0]: inputs} if isinstance(inputs, Tensor) else {n: inputs[n] for n in self._names}
        taken = {name: np.ascontiguousarray(value.numpy()) for name, value in values.items()}
        (logits,) = self._session.run(None, taken)
        return torch.from_numpy(logits)


class _Calibration:
    """Samples of the training split for onnxruntime, one batch after the other."""

    def __init__(self, source: Source, samples: int) -> None:
        self._names = source.names or ["images"]
        drawn = source.train.drawn_inputs(samples, source.run.config.run.seed)
        self._batches: Iterator[tuple[Tensor, ...]] = map(source.values, drawn)

    def get_next(self) -> dict[str, Any] | None:
        """The next batch by input name; None where there is no more."""
        values = next(self._batches, None)
        if values is None:
            return None
        return {name: value.numpy() for name, value in zip(self._names, values, strict=True)}

    def __iter__(self) -> _Calibration:
        return self

    def __next__(self) -> dict[str, Any]:
        batch = self.get_next()
        if batch is None:
            raise StopIteration
        return batch


@contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters print and warn of."""
    import contextlib
    import io
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _name(source: Source) -> str:
    return type(source.model).__name__
