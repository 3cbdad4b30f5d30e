"""What inductor would run on an NVIDIA GPU for a training step, on a machine without one.

    python -m tests.support.cuda_code augment [--cubins]
    python -m tests.support.cuda_code inception_v1|inception_v2 STEM WIDTH MODULE... [--cubins]

Prints one line of JSON, `Cost` for each graph: forward and backward pass, or the augmentation. MODULE are the Inception
modules to keep; none: all. --cubins also has Triton compile every kernel for an H100.

A graph is traced on fake CPU tensors, as autograd needs a real device, and is given fake CUDA tensors before inductor
generates its code. All this changes torch for the whole process, so it is a program of its own.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch._inductor.config as inductor
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from cifar_dist.config import AugmentConfig, ModelConfig
from cifar_dist.data import augment
from cifar_dist.models import architectures
from cifar_dist.models.stems import WhiteningConv
from cifar_dist.training.flat_network import FlatNetwork
from cifar_dist.training.precision import Precision, compile_for_training
from tests.support.generated_code import BATCH, Cost, cost_of

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10, L2_cache_size=50 << 20, clock_rate=1_980_000,
    memory_clock_rate=2_619_000, memory_bus_width=5120, gcnArchName="", is_integrated=0, is_multi_gpu_board=0,
)  # fmt: skip


class Graph(NamedTuple):
    module: fx.GraphModule
    inputs: Sequence[Tensor]
    is_backward: bool


class _GeneratedError(BaseException):
    """Stops inductor after it has generated code."""


def options_of_the_product() -> dict[str, Any]:
    """What the product gives torch.compile as options."""
    with mock.patch("torch.compile") as compile_:
        compile_for_training(print)
    return dict(compile_.call_args.kwargs["options"])


def trace(function: Callable[..., Any], inputs: Sequence[Tensor], backward: bool) -> list[Graph]:
    """`function` as inductor gets it, from fake `inputs`."""
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    graphs: list[Graph] = []

    def keep(is_backward: bool) -> Any:
        def compiler(module: fx.GraphModule, examples: Any) -> fx.GraphModule:
            graphs.append(Graph(module, list(examples), is_backward))
            return module

        return compiler

    def partition(joint: fx.GraphModule, examples: Any, *, num_fwd_outputs: int, **more: Any) -> Any:
        joint_graph_passes(joint)
        return min_cut_rematerialization_partition(
            joint, examples, num_fwd_outputs=num_fwd_outputs, compiler="inductor", **more
        )

    decompositions: Any = select_decomp_table()
    traced = aot_function(
        function, keep(False), keep(True), partition_fn=partition, decompositions=decompositions,
        keep_inference_input_mutations=True,
    )  # fmt: skip
    with nullcontext() if backward else torch.no_grad(), mock.patch("torch.compiler.is_compiling", return_value=True):
        loss, _ = traced(*inputs)
        if backward:
            loss.backward()
    return graphs


def trace_augmentation() -> list[Graph]:
    def function(images: Tensor, indices: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        return augment.augment_batch(images, indices, keys, AugmentConfig(), torch.bfloat16, None)

    with FakeTensorMode():
        images = torch.zeros(BATCH, 32, 32, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        return trace(function, (images, torch.arange(BATCH), torch.zeros(5, dtype=torch.int64)), backward=False)


def trace_network(name: Any, stem: Any, width: float, kept: Sequence[str]) -> list[Graph]:
    rows: Any = architectures.V1 if name == "inception_v1" else architectures.V2
    with mock.patch.dict(rows, {module: rows[module] for module in kept or rows}, clear=True):
        model = architectures.create_model(ModelConfig(name=name, stem=stem, width=width))
    network = FlatNetwork(model.to(memory_format=torch.channels_last).train(), label_smoothing=0.1, num_added=1)

    whitening = [layer for layer in model.modules() if isinstance(layer, WhiteningConv)]

    def function(images: Tensor, labels: Tensor, flat: Tensor, *filters: Tensor) -> Any:
        for layer, weight in zip(whitening, filters, strict=True):
            layer.weight = weight
        with Precision("bf16", "cpu").autocast():
            return torch.func.functional_call(network, {"flat": flat}, (images, labels))

    # What cuDNN says of channels-last tensors; without a GPU torch asks another library.
    torch._C._conv_determine_backend_memory_format = lambda *_, **__: torch.channels_last
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.zeros(BATCH, 32, 32, 3, dtype=torch.bfloat16).permute(0, 3, 1, 2)
        labels, flat = torch.zeros(BATCH, dtype=torch.int64), torch.empty(network.flat.shape, requires_grad=True)
        filters = [torch.empty(layer.weight.shape) for layer in whitening]
        return trace(function, (images, labels, flat, *filters), backward=True)


def pretend_gpu() -> None:
    """Make inductor and fake tensors believe in an H100."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget

    def nothing(*_: Any, **__: Any) -> None:
        return

    def always(value: Any) -> Any:
        return lambda *_, **__: value

    torch._C._ensureCUDADeviceGuardSet()
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": (9, 0),
        "get_device_properties": H100, "get_device_name": H100.name, "is_bf16_supported": True,
        "is_initialized": False, "_exchange_device": 0, "_maybe_exchange_device": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, always(answer))
    for name in ("_lazy_init", "synchronize", "set_device", "set_rng_state"):
        setattr(torch.cuda, name, nothing)
    answers |= {"get_compute_capability": 90, "exchange_device": 0, "maybe_exchange_device": 0,
                "is_triton_capable": True, "raise_if_triton_unavailable": None, "synchronize": None}  # fmt: skip
    for name, answer in answers.items():
        if hasattr(CudaInterface, name):
            setattr(CudaInterface, name, staticmethod(always(answer)))
    for name in ("get_device_properties", "current_device"):
        setattr(CudaInterface.Worker, name, staticmethod(always(answers[name])))
    for module in list(sys.modules.values()):
        for name in ("has_triton", "has_triton_package"):
            if getattr(module, "__name__", "").startswith("torch.") and hasattr(module, name):
                setattr(module, name, always(True))
    target = GPUTarget("cuda", 90, 32)
    driver: Any = SimpleNamespace(
        utils=SimpleNamespace(), get_current_target=always(target), get_current_device=always(0),
        get_active_torch_device=always(torch.device("cuda", 0)), get_device_capability=always((9, 0)),
        get_current_stream=always(0), is_active=always(True),
    )  # fmt: skip
    triton.runtime.driver.set_active(driver)
    triton_helpers.set_driver_to_gpu = nothing
    torch._subclasses.fake_tensor.init_gpu_context = nothing  # type: ignore[assignment]


def generate(graph: Graph, options: dict[str, Any], cubins: bool) -> Cost:
    """Have inductor generate CUDA code of a graph that was traced on the CPU."""
    from torch._inductor import compile_fx
    from torch._inductor.graph import GraphLowering

    for node in graph.module.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    graph.module.recompile()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        inputs = [torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda") for x in graph.inputs]
    with torch.no_grad():
        FakeTensorProp(graph.module, mode).propagate_dont_convert_inputs(*inputs)
    for node in graph.module.graph.nodes:
        node.meta.pop("tensor_meta", None)
    costs: list[Cost] = []

    def stop(self: GraphLowering) -> None:
        code: Any = self.codegen()[0]
        text = code if isinstance(code, str) else code.value
        costs.append(cost_of(self.scheduler, text, num_cubins(text) if cubins else 0))
        raise _GeneratedError

    context: Any = torch._guards.TracingContext(mode)
    with (
        mock.patch.object(GraphLowering, "compile_to_module", stop),
        inductor.patch({"fx_graph_cache": False, "compile_threads": 1, **options}),
        torch._guards.tracing(context),
        torch.no_grad(),
    ):
        try:
            compile_fx.compile_fx_inner(graph.module, inputs, is_backward=graph.is_backward, static_input_idxs=[])
        except _GeneratedError:
            return costs[0]
    raise RuntimeError("inductor has generated no code")


def num_cubins(text: str) -> int:
    """Compile all kernels of generated code with Triton and its ptxas, which need no driver."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner, StaticTritonCompileResult

    compiled: list[bytes] = []

    def precompile(self: Any, *_: Any, **__: Any) -> None:
        result = self._precompile_config(self.configs[0])
        assert not isinstance(result, StaticTritonCompileResult), "its launcher holds the GIL"
        kernel = result.kernel
        assert kernel.metadata.target.arch == 90
        compiled.append(kernel.asm["cubin"])

    with mock.patch.object(CachingAutotuner, "precompile", precompile):
        exec(compile(text, "generated", "exec"), {"__name__": "generated"})
    assert all(cubin.startswith(b"\x7fELF") for cubin in compiled)
    return len(compiled)


def main() -> None:
    cubins = "--cubins" in sys.argv
    what, *more = [word for word in sys.argv[1:] if word != "--cubins"]
    options = options_of_the_product()  # before tracing, as it changes how torch decomposes operations
    graphs = trace_augmentation() if what == "augment" else trace_network(what, more[0], float(more[1]), more[2:])
    pretend_gpu()
    print(json.dumps([generate(graph, options, cubins)._asdict() for graph in graphs]))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict("os.environ", TORCHINDUCTOR_CACHE_DIR=folder):
        main()
