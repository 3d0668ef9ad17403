"""With a GPU: ResNet-50 at batches of 1 to 64 through edged, against bare ONNX Runtime on the same GPU."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from bench.harness import Daemon
from bench.load import Effort, interleaved, median, percentile
from bench.report import Claim, Progress, Section, not_measured, run_alone, table
from bench.targets import Target, opened
from tests import zoo

COMMAND = "python -m bench.cuda"
TITLE = "On a GPU"
BATCHES = (1, 2, 4, 8, 16, 32, 64)
SETTINGS = 'runtime = "onnxruntime"\ndevice = "CUDA:0"\npolicy = "require"\n'


def measure(progress: Progress, effort: Effort) -> Section:
    """A table where there is a GPU, and a sentence where there is none."""
    why = missing()
    if why:
        claim = not_measured("ResNet-50 on CUDA, batches of 1 to 64, over bare ONNX Runtime", "told", why)
        return Section(TITLE, COMMAND, f"No figures from here: {why}.", (claim,))
    rows, claims = [], []
    with ExitStack() as stack:
        daemon = Daemon(ready_timeout_s=300)
        stack.callback(daemon.close)
        file = daemon.put("resnet50", with_batches(onnx.load(zoo.real("resnet50"))), SETTINGS)
        daemon.start()
        with daemon.client() as client:
            feed = client.model_metadata("resnet50")["inputs"][0]["name"]
        for batch in BATCHES:
            progress(f"cuda: batch of {batch}")
            shape = (batch, 3, 224, 224)
            bare = Target("settings", model=file, input_name=feed, shape=shape, device="CUDA:0")
            served = Target("client", daemon.endpoint, "resnet50", input_name=feed, shape=shape)
            targets = {
                "bare": bare,
                "bare, defaults": replace(bare, way="defaults"),
                "edged": served,
                "edged, input in a lease": replace(served, way="lease"),
            }
            with ExitStack() as own:
                asks = {name: own.enter_context(opened(target)) for name, target in targets.items()}
                times = interleaved(asks, effort)
            base_s = median(times["bare"])
            for name, samples in times.items():
                p50_s = median(samples)
                rows.append(
                    (
                        batch,
                        name,
                        f"{p50_s * 1e3:.2f}",
                        f"{percentile(samples, 0.99) * 1e3:.2f}",
                        f"{batch / p50_s:,.0f}",
                        f"{p50_s / base_s:.2f}",
                    )
                )
            ratio = f"{median(times['edged']) / base_s:.2f} ×"
            text = f"ResNet-50 on CUDA, batch {batch}, p50 over bare ONNX Runtime"
            claims.append(Claim(text, "told", ratio, None))
    text = f"""
ResNet-50 with random weights and a dynamic batch, FP32 (TF32 off, as edged has it; "defaults" are ONNX
Runtime's), one request at a time, {effort.slots} slots of {effort.slot_s:g} s each in turns.

{table(("batch", "by", "p50 ms", "p99 ms", "images/s", "× bare"), rows)}
"""
    return Section(TITLE, COMMAND, text, claims)


def missing() -> str:
    """Why nothing can be measured here; empty where everything is there."""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "this ONNX Runtime was built without CUDA, as edged[cpu] has it"
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = str(zoo.write(Path(folder) / "tiny.onnx", zoo.mlp()))
            with opened(Target("defaults", model=file, device="CUDA:0")) as ask:
                ask()
    except Exception as e:  # noqa: BLE001 - a driver's absence has many faces; each is a reason to be told
        return f"no GPU that ONNX Runtime can use: {e}"
    return ""


def with_batches(model: onnx.ModelProto) -> bytes:
    """The model with a dynamic first dimension, also where it is reshaped to one row."""
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    shapes = {node.input[1] for node in model.graph.node if node.op_type == "Reshape"}
    for tensor in model.graph.initializer:
        if tensor.name in shapes:
            _, *rest = onnx.numpy_helper.to_array(tensor).tolist()
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.array([-1, *rest], np.int64), tensor.name))
    del model.graph.value_info[:]
    data: bytes = model.SerializeToString()
    return data


if __name__ == "__main__":
    run_alone(measure)
