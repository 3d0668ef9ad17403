"""Every runtime keeps to the seam, and each one's own traps stay shut."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edged.errors import Code
from edged.properties import parted
from edged.runtimes.base import LoadCancel, LoadFailed, LoadRequest, RunFailed, clean_text, create_runtime
from edged.runtimes.tiny import run_tiny_model, tiny_model
from edged.testing import check_runtime, write_fake_model
from tests import zoo

_ONNX_TYPES = {
    "BOOL": TensorProto.BOOL,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BF16": TensorProto.BFLOAT16,
    "BYTES": TensorProto.STRING,
}


def save(
    path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], initializers: Sequence[Any] = ()
) -> Path:
    """Saves an ONNX model of these parts."""
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(initializers))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def value(name: str, shape: Sequence[Any], datatype: int = TensorProto.FLOAT) -> Any:
    """A graph's input or output; -1 is free."""
    return helper.make_tensor_value_info(
        name, datatype, [f"d{i}" if d == -1 else d for i, d in enumerate(shape)]
    )


@pytest.fixture
def echo(tmp_path: Path) -> Callable[[str, Sequence[int]], Path]:
    """Writes ONNX models that give back what they get."""

    def make(datatype: str, shape: Sequence[int]) -> Path:
        kind = _ONNX_TYPES[datatype]
        node = helper.make_node("Identity", ["x"], ["y"])
        return save(tmp_path / "echo.onnx", [node], [value("x", shape, kind)], [value("y", shape, kind)])

    return make


def load(runtime: str, path: Path, **settings: Any) -> Any:
    """A model on the CPU."""
    return create_runtime(runtime).load(LoadRequest(path=str(path), **settings), LoadCancel())


ALPHABET = "\n".join(chr(0x4E00 + n) for n in range(13_245))


@pytest.mark.parametrize("version", [0, 7, None])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_metadata_is_the_files_whatever_runs_it(tmp_path: Path, runtime: str, version: int | None) -> None:
    """A change of runtime must not change what an app reads; keys may be called like a model's own fields."""
    said = {"character": ALPHABET, "version": "8.1", "description": "own", "empty": "", "": "no key"}
    model = zoo.saying(said, version=version)
    path = zoo.write(tmp_path / "m.onnx", model)
    fields, own = parted(load(runtime, path).metadata)
    assert own == said
    assert fields == {
        "producer_name": model.producer_name,
        "graph_name": model.graph.name,
        "domain": model.domain,
        "description": model.doc_string,
        "graph_description": model.graph.doc_string,
        "version": "" if version is None else str(version),
    }


def test_an_irs_metadata_is_told_with_what_lies_in_maps(tmp_path: Path) -> None:
    """Labels stand in a map of their own there; each value under its path."""
    import openvino as ov

    model = ov.Core().read_model(tiny_model())
    model.set_rt_info(ALPHABET, ["model_info", "labels"])
    model.set_rt_info("yes", ["flat"])
    ov.save_model(model, tmp_path / "m.xml")
    metadata = load("openvino", tmp_path / "m.xml", format="openvino_ir").metadata
    assert metadata["model_info.labels"] == ALPHABET
    assert metadata["flat"] == "yes"


def test_fake_conforms(tmp_path: Path) -> None:
    """The shipped fake keeps to the seam that it stands for."""

    def make(datatype: str, shape: Sequence[int]) -> Path:
        return write_fake_model(
            tmp_path / "m.fake", inputs={"x": (datatype, shape)}, outputs={"y": (datatype, shape)}
        )

    check_runtime(create_runtime("fake"), make_echo=make, directory=tmp_path)


def test_onnxruntime_conforms(tmp_path: Path, echo: Any) -> None:
    """ONNX Runtime keeps to the seam, with every datatype of the protocol."""
    taken = check_runtime(create_runtime("onnxruntime"), make_echo=echo, directory=tmp_path)
    assert set(taken) == set(_ONNX_TYPES)


def test_openvino_conforms(tmp_path: Path, echo: Any) -> None:
    """OpenVINO keeps to the seam, with every datatype but strings, which corrupt its heap."""
    taken = check_runtime(create_runtime("openvino"), make_echo=echo, directory=tmp_path)
    assert set(taken) == set(_ONNX_TYPES) - {"BYTES"}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_tiny_model_runs(runtime: str) -> None:
    """The model that proves a device is valid ONNX and answers as it should."""
    onnx.checker.check_model(onnx.load_from_string(tiny_model()))
    run_tiny_model(create_runtime(runtime), "CPU")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_ep_context_is_refused(runtime: str, tmp_path: Path) -> None:
    """A model with compiled device code in it is refused by name."""
    node = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context=b"code")
    path = save(tmp_path / "m.onnx", [node], [value("x", [1])], [value("y", [1])])
    with pytest.raises(LoadFailed, match="EPContext"):
        load(runtime, path)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_weights_at_a_memory_address_are_refused(runtime: str, tmp_path: Path) -> None:
    """External data at a memory address, which ends OpenVINO with SIGSEGV, is refused before it is read."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, text in (("location", "*/_ORT_MEM_ADDR_/*"), ("offset", "4096"), ("length", "16")):
        weight.external_data.add(key=key, value=text)
    node = helper.make_node("Add", ["x", "w"], ["y"])
    path = save(tmp_path / "m.onnx", [node], [value("x", [4])], [value("y", [4])], [weight])
    with pytest.raises(LoadFailed) as caught:
        load(runtime, path)
    assert caught.value.reason == "MODEL_INVALID"


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_missing_external_data_is_a_load_failure(runtime: str, tmp_path: Path) -> None:
    """A model whose weights are not beside it does not load."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="weights.bin")
    node = helper.make_node("Add", ["x", "w"], ["y"])
    path = save(tmp_path / "m.onnx", [node], [value("x", [4])], [value("y", [4])], [weight])
    with pytest.raises(LoadFailed):
        load(runtime, path)


def test_free_dimensions_keep_their_names(tmp_path: Path) -> None:
    """ONNX Runtime's symbolic dimensions come out as -1 and their names."""
    node = helper.make_node("Identity", ["x"], ["y"])
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, None])
    model = load("onnxruntime", save(tmp_path / "m.onnx", [node], [info], [value("y", [-1, 3, -1])]))
    assert model.inputs[0].shape == (-1, 3, -1)
    assert model.inputs[0].dim_names == ("batch", None, None)


def test_initializer_that_is_an_input_is_optional(tmp_path: Path) -> None:
    """A default value among the inputs may be left out, or be given."""
    weight = numpy_helper.from_array(np.array([5.0], np.float32), "b")
    node = helper.make_node("Add", ["x", "b"], ["y"])
    path = save(
        tmp_path / "m.onnx", [node], [value("x", [-1]), value("b", [1])], [value("y", [-1])], [weight]
    )
    model = load("onnxruntime", path)
    assert [(s.name, s.optional) for s in model.inputs] == [("x", False), ("b", True)]
    one = np.ones(1, np.float32)
    assert model.run({"x": one}, ["y"])[0].tolist() == [6.0]
    assert model.run({"x": one, "b": one}, ["y"])[0].tolist() == [2.0]


def test_strings_that_are_not_utf8_are_the_requests_fault(echo: Any) -> None:
    """ONNX Runtime's strings are UTF-8: other bytes are refused, never turned into their repr."""
    model = load("onnxruntime", echo("BYTES", (-1,)))
    with pytest.raises(RunFailed) as caught:
        model.run({"x": np.array([b"\xff"], object)}, ["y"])
    assert caught.value.code == Code.INVALID_ARGUMENT.value


@pytest.mark.parametrize("echo", [False, True])
def test_one_element_for_a_scalar_is_answered_as_onnx_runtime_does(echo: bool, tmp_path: Path) -> None:
    """Of any rank: the same shapes from both runtimes, or a refusal where OpenVINO would give another."""
    path = zoo.write(tmp_path / "m.onnx", zoo.scalar_rate(echo=echo))
    theirs, ours = load("onnxruntime", path), load("openvino", path)
    names = ["y", "rate"] if echo else ["y"]
    for shape in ((), (1,), (1, 1), (1, 1, 1)):
        feeds = {"x": np.float32([[8, 4], [2, 1]]), "sr": np.full(shape, 4, np.int64)}
        want = theirs.run(feeds, names)
        assert [value.shape for value in want] == [np.broadcast_shapes((2, 2), shape), shape][: len(names)]
        if len(shape) > 2 or (echo and shape):
            with pytest.raises(RunFailed) as refused:
                ours.run(feeds, names)
            assert (refused.value.code, refused.value.reason) == ("INVALID_ARGUMENT", "REFUSED_BY_RUNTIME")
        else:
            for value, wanted in zip(ours.run(feeds, names), want, strict=True):
                np.testing.assert_array_equal(value, wanted, strict=True)
    two = {"x": np.ones((2, 2), np.float32), "sr": np.ones(2, np.int64)}
    with pytest.raises(RunFailed):
        ours.run(two, names)
    once_more = {"x": np.ones((2, 2), np.float32), "sr": np.array(2)}
    assert ours.run(once_more, ["y"])[0].tolist() == [[0.5, 0.5], [0.5, 0.5]]


def long_model(path: Path) -> Path:
    """A model that runs for a minute: a chain of products, since a cancel takes effect between nodes."""
    chain = [helper.make_node("MatMul", [f"t{i}", "t0"], [f"t{i + 1}"]) for i in range(1000)]
    ends = (value("t0", [1500, 1500]), value("t1000", [1500, 1500]))
    return save(path, chain, [ends[0]], [ends[1]])


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_running_inference_can_be_cancelled(runtime: str, tmp_path: Path) -> None:
    """Another thread ends a run that would take minutes, and the model works afterwards."""
    model = load(runtime, long_model(tmp_path / "m.onnx"))
    caught: list[RunFailed] = []
    done = threading.Event()

    def run() -> None:
        try:
            model.run({"t0": np.zeros((1500, 1500), np.float32)}, ["t1000"])
        except RunFailed as e:
            caught.append(e)
        done.set()

    threading.Thread(target=run, daemon=True).start()
    for _ in range(600):
        model.cancel()
        if done.wait(0.05):
            break
    assert [e.code for e in caught] == ["CANCELLED"]


def test_openvino_stays_in_f32(tmp_path: Path) -> None:
    """The default precision is f32 even on a CPU whose own default is bf16; fast is what the CPU has."""
    weight = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [value("x", [1, 256])],
        [value("y", [1, 256])],
        [numpy_helper.from_array(weight, "w")],
    )
    x = np.random.default_rng(1).standard_normal((1, 256)).astype(np.float32)
    exact = load("openvino", path)
    assert exact.precision == "f32"
    np.testing.assert_allclose(exact.run({"x": x}, ["y"])[0], x @ weight, rtol=1e-4, atol=1e-4)
    runtime = create_runtime("openvino")
    assert load("openvino", path, precision="fast").precision == (runtime.precision_fast("CPU") or "f32")


def test_openvino_refuses_the_npu_in_f32(tmp_path: Path, echo: Any) -> None:
    """A device that has no FP32 is not used for a model that asked for it."""
    with pytest.raises(LoadFailed, match="fast"):
        load("openvino", echo("FP32", (1,)), device="NPU")


def test_cuda_without_cuda_says_what_to_install(echo: Any) -> None:
    """A CPU build asked for CUDA fails with the remedy; it does not fall back."""
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(LoadFailed, match=r"edged\[cuda\]") as caught:
        load("onnxruntime", echo("FP32", (1,)), device="CUDA:0")
    assert caught.value.reason == "DEVICE_FAILED"


def test_zipmap_classifier_gives_a_sequence_of_maps(tmp_path: Path) -> None:
    """scikit-learn's classifiers answer labels and a list of dicts, as ONNX Runtime gives them."""
    model = load("onnxruntime", zipmap_model(tmp_path / "m.onnx"))
    assert [s.datatype for s in model.outputs] == ["INT64", "SEQUENCE"]
    label, probabilities = model.run({"x": np.eye(3, dtype=np.float32)}, ["label", "probabilities"])
    assert label.tolist() == [0, 1, 2]
    assert [max(p, key=p.get) for p in probabilities] == [0, 1, 2]


def zipmap_model(path: Path) -> Path:
    """A classifier with a ZipMap, as skl2onnx writes one."""
    nodes = [
        helper.make_node("ArgMax", ["x"], ["label"], axis=1, keepdims=0),
        helper.make_node("Softmax", ["x"], ["p"], axis=1),
        helper.make_node(
            "ZipMap", ["p"], ["probabilities"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2]
        ),
    ]
    map_type = helper.make_map_type_proto(
        TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    )
    sequence = helper.make_value_info("probabilities", helper.make_sequence_type_proto(map_type))
    graph = helper.make_graph(
        nodes, "g", [value("x", [-1, 3])], [value("label", [-1], TensorProto.INT64), sequence]
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())
    return path


def test_messages_show_no_paths_and_no_addresses() -> None:
    """What a library says reaches a stranger without directories, addresses or line breaks."""
    text = clean_text("open file /home/me/models/a.onnx failed\nat 0x7ffee4c0 (/onnxruntime_src/x.cc:12)")
    assert text == "open file a.onnx failed at 0x… (x.cc:12)"
    assert len(clean_text("x" * 9999)) == 500


def test_a_model_that_cannot_be_compiled_again_is_gone(tmp_path: Path) -> None:
    """After a failed run a model of free shapes is compiled again; without its file nobody waits for it."""
    path = zoo.write(tmp_path / "m.onnx", zoo.fully_conv(multiple=8))
    model = load("openvino", path)
    path.unlink()
    for size in (9, 16):
        with pytest.raises(RunFailed, match="could not be compiled again") as failed:
            model.run({"x": np.ones((1, 3, size, size), np.float32)}, ["y"])
        assert failed.value.fatal
