"""Linear layers, norms, and the layer of gpt2-large that they make up with decode attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from attention_cases import BLOCK, Paged, decode_work
from gpu_timing import Work, copies_for
from kernel_case import Case, Setting, Target
from octavo_kernels.gemm_plan import GemmPlan, candidates
from octavo_kernels.linear import linear, workspace_size
from octavo_kernels.norm import add_layer_norm, layer_norm
from torch import Tensor

WIDTH, VOCAB = 1280, 50304
SHAPES = {"qkv": (3 * WIDTH, WIDTH), "proj": (WIDTH, WIDTH), "fc": (4 * WIDTH, WIDTH), "proj2": (WIDTH, 4 * WIDTH)}
"""Outputs and inputs of gpt2-large's; lm_head comes apart."""
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 1024)
NORM_ROWS = (1, 16, 256, 2048, 16384)
LARGE_NORM = 16384
"""Rows that move 168 MB: fewer are bound by the launch, or stay in L2."""
LAYER = ((1, 256), (8, 256), (64, 256), (256, 64), (256, 256))
SKINNY = 16
EPS = 1e-5


@dataclass
class Layer:
    """One linear layer in copies, and its input."""

    setting: Setting
    name: str
    rows: int
    outputs: int
    inputs: int

    def __post_init__(self) -> None:
        weight_bytes = self.outputs * self.inputs * self.setting.dtype.itemsize
        self.copies = copies_for(weight_bytes, self.setting.l2_bytes)
        self.activation = "gelu_new" if self.name == "fc" else None
        self.x = self.random(self.rows, self.inputs)
        self.weights = [self.random(self.outputs, self.inputs) * 0.02 for _ in range(self.copies)]
        self.bias = None if self.name == "lm_head" else self.random(self.outputs)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.setting.device, dtype=self.setting.dtype)

    @property
    def bytes(self) -> float:
        numbers = self.outputs * self.inputs + self.rows * (self.inputs + self.outputs)
        return float(numbers * self.setting.dtype.itemsize)

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.outputs * self.inputs


def linear_cases(setting: Setting) -> Iterator[Case]:
    shapes = (
        {"qkv": (48, 32), "fc": (64, 32), "proj2": (32, 64)} if setting.tiny else SHAPES | {"lm_head": (VOCAB, WIDTH)}
    )
    for name, (outputs, inputs) in shapes.items():
        for rows in (1, 5) if setting.tiny else ROWS:
            if name == "lm_head" and rows > 256:
                continue
            yield linear_case(Layer(setting, name, rows, outputs, inputs))


def linear_case(layer: Layer) -> Case:
    contenders: dict[str, Callable[[], Work]] = {
        "cuBLAS": partial(cublas_work, layer),
        "octavo": partial(linear_work, layer),
        "octavo batch-invariant": partial(linear_work, layer, batch_invariant=True),
    }
    if layer.setting.sweep:
        for plan in candidates(layer.rows, layer.outputs, layer.inputs, layer.setting.dtype):
            contenders[f"octavo {plan_text(plan)}"] = partial(linear_work, layer, plan=plan)
    return Case(
        bench="linear",
        name=f"{layer.name} {layer.rows}",
        facts={"layer": layer.name, "m": layer.rows, "o": layer.outputs, "k": layer.inputs},
        bytes=layer.bytes,
        flops=layer.flops,
        copies=layer.copies,
        contenders=contenders,
        target=Target("octavo", ahead=True) if layer.rows <= SKINNY else None,
    )


def linear_work(layer: Layer, plan: GemmPlan | None = None, batch_invariant: bool = False) -> Work:
    out = torch.empty(layer.rows, layer.outputs, device=layer.setting.device, dtype=layer.setting.dtype)
    if plan:
        words = plan.splits * layer.rows * layer.outputs if plan.splits > 1 else 0
    else:
        words = workspace_size(layer.rows, layer.outputs, layer.inputs, layer.x.dtype, layer.x.device)
    workspace = torch.empty(words, device=layer.setting.device) if words else None

    def run(copy: int) -> None:
        linear(
            layer.x,
            layer.weights[copy],
            layer.bias,
            activation=layer.activation,
            out=out,
            batch_invariant=batch_invariant,
            plan=plan,
            workspace=workspace,
        )

    def result() -> Tensor:
        run(0)
        return out

    return Work(run, result)


def cublas_work(layer: Layer) -> Work:
    """F.linear, and the activation as a kernel of its own."""
    results: list[Tensor] = [layer.x]

    def run(copy: int) -> None:
        y = F.linear(layer.x, layer.weights[copy], layer.bias)
        results[0] = F.gelu(y, approximate="tanh") if layer.activation else y

    def result() -> Tensor:
        run(0)
        return results[0]

    return Work(run, result)


def plan_text(plan: GemmPlan) -> str:
    tiles = f"{plan.tile_m}x{plan.tile_o}x{plan.tile_k}"
    return f"{tiles} splits {plan.splits} warps {plan.num_warps} stages {plan.num_stages}"


def norm_cases(setting: Setting) -> Iterator[Case]:
    width = 96 if setting.tiny else WIDTH
    for rows in (1, 3) if setting.tiny else NORM_ROWS:
        for fused in (False, True):
            yield norm_case(setting, rows, width, fused)


def norm_case(setting: Setting, rows: int, width: int, fused: bool) -> Case:
    moved = float((4 if fused else 2) * rows * width * setting.dtype.itemsize)
    copies = copies_for(moved, setting.l2_bytes)
    makers = (torch_norm_work, octavo_norm_work)
    return Case(
        bench="norm",
        name=f"{'add + norm' if fused else 'norm'} {rows}",
        facts={"rows": rows, "width": width, "fused": fused},
        bytes=moved,
        flops=8.0 * rows * width,
        copies=copies,
        contenders={
            name: partial(make, setting, rows, width, fused, copies)
            for name, make in zip(("torch", "octavo"), makers, strict=True)
        },
        target=Target("octavo", fraction=0.85 if rows == LARGE_NORM else None, ahead=True) if fused else None,
    )


def norm_buffers(setting: Setting, rows: int, width: int, copies: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residual streams [copies, rows, width], deltas, weight, bias; the same numbers for every contender."""
    generator = torch.Generator(setting.device).manual_seed(rows)
    shapes = ((copies, rows, width), (copies, rows, width), (width,), (width,))
    a, b, weight, bias = (
        torch.randn(shape, device=setting.device, dtype=setting.dtype, generator=generator) for shape in shapes
    )
    return a, b, weight, bias


def octavo_norm_work(setting: Setting, rows: int, width: int, fused: bool, copies: int) -> Work:
    streams, deltas, weight, bias = norm_buffers(setting, rows, width, copies)
    first = streams.clone()
    out = torch.empty_like(streams)

    def run(copy: int) -> None:
        if fused:
            add_layer_norm(streams[copy], deltas[copy], weight, bias, EPS, out[copy])
        else:
            layer_norm(streams[copy], weight, bias, EPS, out[copy])

    def reset() -> None:
        streams.copy_(first)

    def result() -> Tensor:
        reset()
        run(0)
        return out[0]

    return Work(run, result, reset)


def torch_norm_work(setting: Setting, rows: int, width: int, fused: bool, copies: int) -> Work:
    streams, deltas, weight, bias = norm_buffers(setting, rows, width, copies)
    first = streams.clone()
    results: list[Tensor] = [streams]

    def run(copy: int) -> None:
        x = streams[copy]
        if fused:
            x += deltas[copy]
        results[0] = F.layer_norm(x, (width,), weight, bias, EPS)

    def reset() -> None:
        streams.copy_(first)

    def result() -> Tensor:
        reset()
        run(0)
        return results[0]

    return Work(run, result, reset)


def layer_cases(setting: Setting) -> Iterator[Case]:
    """A decode step's share of one layer: two norms, four linears, attention."""
    for rows, context in ((2, 33),) if setting.tiny else LAYER:
        paged = Paged(setting, [context] * rows, [1] * rows)
        width = paged.heads * 64
        shapes = {
            "qkv": (3 * width, width),
            "proj": (width, width),
            "fc": (4 * width, width),
            "proj2": (width, 4 * width),
        }
        layers = {name: Layer(setting, name, rows, *shape) for name, shape in shapes.items()}
        vectors = torch.randn(4, width, device=setting.device, dtype=setting.dtype)
        yield Case(
            bench="layer",
            name=f"{rows} x {context}",
            facts={"rows": rows, "context": context, "block": BLOCK, "heads": paged.heads},
            bytes=sum(layer.outputs * layer.inputs for layer in layers.values()) * 2.0 + paged.bytes,
            flops=sum(layer.flops for layer in layers.values()) + paged.flops,
            copies=max(2, min(paged.copies, *(layer.copies for layer in layers.values()))),
            contenders={
                "torch, dense cache": partial(torch_layer_work, paged, layers, vectors),
                "octavo": partial(octavo_layer_work, paged, layers, vectors),
                "octavo batch-invariant": partial(octavo_layer_work, paged, layers, vectors, True),
            },
            target=Target("octavo", ahead=True),
        )


def octavo_layer_work(paged: Paged, layers: dict[str, Layer], vectors: Tensor, batch_invariant: bool = False) -> Work:
    """As worker/gpt2_triton.py launches it."""
    attend = decode_work(paged, "dot" if batch_invariant else "fma")
    hidden = layers["qkv"].x.clone()
    first, normed = hidden.clone(), torch.empty_like(hidden)
    delta = torch.randn_like(hidden)
    assert attend.result is not None
    attended = attend.result()

    def apply(name: str, x: Tensor, copy: int, out: Tensor | None = None) -> Tensor:
        layer = layers[name]
        weight = layer.weights[copy % layer.copies]
        return linear(x, weight, layer.bias, activation=layer.activation, out=out, batch_invariant=batch_invariant)

    def run(copy: int) -> None:
        add_layer_norm(hidden, delta, vectors[0], vectors[1], EPS, normed)
        apply("qkv", normed, copy, paged.qkv)
        attend.run(copy % paged.copies)
        after = apply("proj", attended, copy)
        add_layer_norm(hidden, after, vectors[2], vectors[3], EPS, normed)
        apply("proj2", apply("fc", normed, copy), copy)

    return Work(run, reset=lambda: hidden.copy_(first))


def torch_layer_work(paged: Paged, layers: dict[str, Layer], vectors: Tensor) -> Work:
    """The same equations in PyTorch's kernels, over a dense cache into which the new token is not even written."""
    hidden = layers["qkv"].x.clone()
    first, delta = hidden.clone(), torch.randn_like(hidden)
    caches = paged.dense()
    rows, width = hidden.shape

    def apply(name: str, x: Tensor, copy: int) -> Tensor:
        layer = layers[name]
        y = F.linear(x, layer.weights[copy % layer.copies], layer.bias)
        return F.gelu(y, approximate="tanh") if layer.activation else y

    def run(copy: int) -> None:
        hidden.add_(delta)
        qkv = apply("qkv", F.layer_norm(hidden, (width,), vectors[0], vectors[1], EPS), copy)
        query = qkv.view(rows, 3, paged.heads, -1)[:, 0, :, None]
        attended = F.scaled_dot_product_attention(query, *caches[copy % paged.copies]).reshape(rows, width)
        hidden.add_(apply("proj", attended, copy))
        normed = F.layer_norm(hidden, (width,), vectors[2], vectors[3], EPS)
        apply("proj2", apply("fc", normed, copy), copy)

    return Work(run, reset=lambda: hidden.copy_(first))
