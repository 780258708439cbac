"""Tiny modules, one a feature of Python or PyTorch that code in the wild uses, and the calls that exercise it.

``CASES`` is the table: a module class, and its calls; the first call is the example that ``prepare`` sees, the others
differ in batch size, resolution, dtype or flags. Images are ``(B, 4, H, W)`` unless a case says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Args = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Call:
    """One call: ``make`` draws the arguments anew each time."""

    name: str
    make: Callable[[], Args]


@dataclass(frozen=True)
class Case:
    """``compiles``: torch.compile(fullgraph=True) takes it; ``pickles``: pickle takes the original."""

    build: Callable[[], nn.Module]
    calls: tuple[Call, ...]
    compiles: bool = False
    pickles: bool = True


def images(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Call, ...]:
    """Calls with one tensor of each shape."""

    def call(shape: tuple[int, ...]) -> Call:
        return Call("x".join(map(str, shape)), lambda: ((torch.randn(shape, dtype=dtype),), {}))

    return tuple(map(call, shapes))


# Another batch, batch 1, another resolution, odd sides, a single row.
ANY = images((2, 4, 8, 6), (5, 4, 8, 6), (1, 4, 8, 6), (2, 4, 12, 10), (3, 4, 7, 5), (1, 4, 1, 9))
TOKENS = images((2, 16, 4), (1, 16, 4), (3, 25, 4), (2, 64, 4), (1, 1, 4))


class Image(nn.Module):
    """A 1x1 convolution that most cases start with, so that gradients reach a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)


# ---- sizes and views -----------------------------------------------------------------------------------------------


class Reshapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        y = self.proj(x.permute(0, 2, 3, 1).reshape(B, H * W, C)).view(B, H, W, -1)
        y = y.transpose(1, 2).contiguous().view(B, -1, y.size(3) // 2, 2)  # (B, W*H, 3, 2)
        return y.flatten(1, 2).unflatten(1, (W, H, 3)).expand(B, W, H, 3, 2).sum(-1)


class SizeArithmetic(Image):
    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[-2:]
        y = F.pad(self.conv(x), (0, (4 - W % 4) % 4, 0, -H % 4))  # up to multiples of four
        rows, cols = y.size(2) // 4, divmod(y.size(3), 4)[0]
        y = y.view(len(x), 4, rows, 4, cols, 4).transpose(3, 4).reshape(-1, 4, 4, 4)  # windows
        y = torch.roll(y, (1, 2), (2, 3)).view(x.size(0), rows * cols, x.numel() // (len(x) * H * W), -1)
        return y.mean(1) * (H * 0.5) + y.ndim + max(H, 3) - min(W, 100) / x.dim()


class Interpolates(Image):
    def forward(self, x: Tensor) -> Tensor:
        H, W = x.size(2), x.size(-1)
        y = F.interpolate(self.conv(x), size=(H * 2, W + 3), mode="bilinear", align_corners=False)
        return y[:, :, ::2, 1::2][:, :, :H] - y[..., -1:, : (W + 3) // 2]


class ItemAssignment(Image):
    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        y = self.conv(x)
        out = x.new_empty((B, 4, C, H * W))
        out[:, 0] = y.flatten(2, 3)
        out[:, 1] = y.transpose(2, 3).flatten(2, 3)
        out[:, 2:4] = torch.flip(out[:, 0:2], dims=[-1])
        out[0, 0, 0, 0] = 3.0
        return out


class InPlaceOnViews(Image):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, :2].mul_(2).add_(1)
        y.view(len(x), -1)[:, 0] = 3
        y += x
        first = y[0]
        first *= 0.5
        return y


class ListIndex(Image):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)[:, [2, 0, 1]]
        order = torch.arange(x.size(2)).flip(0)
        return y[:, :, order][..., [0, -1]] + y[:, :, :1, :1] + y[..., 0, 0, None, None]


class Unpacks(Image):
    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, dim=1)
        parts = torch.split(x, [1, 3], dim=1)
        first, *rest = x.unbind(1)
        for part in rest:
            first = first + part
        return a.sigmoid() * b + parts[0] - parts[1].mean(1, keepdim=True) + first[:, None]


class IteratesOverBatch(Image):
    """Bakes the batch size unless the loop is a guard."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.conv(sample[None])[0] * (i + 1) for i, sample in enumerate(x)])


class MemoryFormat(Image):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.to(memory_format=torch.channels_last)).contiguous()
        return y.to(x.dtype).float().contiguous() + x.contiguous()


class Factories(Image):
    def forward(self, x: Tensor) -> Tensor:
        B, _, H, W = x.shape
        rows = torch.arange(H, device=x.device, dtype=x.dtype).view(H, 1)
        grid = rows / H + torch.linspace(-1, 1, W)
        grid = grid + torch.full((W,), 2.0) + torch.zeros(H, W, device=x.device)
        token = x.new_zeros(B, 1, H, W) + x.new_full((1,), 0.5) + torch.ones_like(x[:, :1])
        mask = torch.tril(torch.ones(H, H, dtype=torch.bool))
        return self.conv(x) * grid + token + torch.eye(H).masked_fill(mask, 0.25).sum()


class Random(Image):
    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(x.size(0), 1, *x.shape[2:]) + torch.randn_like(x)
        keep = x.new_empty((len(x), 1, 1, 1)).bernoulli_(0.5)
        return self.conv(x) * keep + noise + torch.randint(0, 5, (x.shape[-1],))


# ---- size-dependent Python -----------------------------------------------------------------------------------------


class FormatsSizes(Image):
    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        assert C == 4, f"expected 4 channels, got {C} of {B}x{H}x{W}"
        return self.conv(x) * len(f"{H:>{3}}|{W}")


class SizeCache(Image):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[tuple[int, int], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2], x.shape[3]
        if (H, W) not in self.cache:
            self.cache[H, W] = torch.arange(H * W).view(H, W).float()
        return self.conv(x) + self.cache[H, W]


class HalfSize(Image):
    def forward(self, x: Tensor) -> Tensor:
        middle = int(x.shape[2] / 2)
        return self.conv(x[:, :, middle:]) - x[:, :, middle : middle + 1]


class SquareRoot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        B, L, C = x.shape
        side = int(math.sqrt(L))
        return self.proj(x).view(B, side, side, C).cumsum(1) * (1 / math.sqrt(L))


class RangeLoop(Image):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.stack([y[..., i] * i for i in range(x.shape[3])], dim=-1)


class OddBranch(Image):
    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        if H % 2 == 1:
            x = F.pad(x, (0, 0, 0, 1))
        if W % 2:
            x = F.pad(x, (0, 1))
        return F.pixel_unshuffle(self.conv(x), 2)


class SizeBranch(Image):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] * x.shape[-2] > 40:
            x = x * 3
        elif x.shape[-1] > x.shape[-2]:
            x = x.flip(-1)
        return self.conv(x) + (1 if x.size(0) == 1 else 2)


class InnerSizeBranch(Image):
    """Branches on the size of an intermediate value."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x[:, :, ::3])
        return y.mean(2) if y.shape[2] > 2 else y.amax(2)


class IsInstance(Image):
    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2]
        if not isinstance(size, int) or not isinstance(x.shape, tuple) or not isinstance(x, torch.Tensor):
            raise TypeError("sizes are ints")
        return self.conv(x) * size


# ---- arguments and results -----------------------------------------------------------------------------------------


class DtypeBranch(Image):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return self.conv(x.float()).double() * 2
        if x.dtype is torch.uint8:
            x = x.float() / 255
        return self.conv(x)


class Flags(Image):
    def forward(self, x: Tensor, scale: float = 1.0, mode: str = "plain", *, flip: bool = False) -> Tensor:
        y = self.conv(x) * scale
        if flip:
            y = y.flip(-1)
        return {"plain": y, "square": y * y}[mode]


class Keywords(Image):
    def forward(self, image: Tensor, *, mask: Tensor) -> Tensor:
        return self.conv(image) * mask - mask.mean()


class Optional(Image):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        return y if mask is None else y * mask


class Containers(Image):
    """Inputs inside a list and a dict."""

    def forward(self, batch: dict[str, Any], extra: list[Tensor]) -> Tensor:
        return self.conv(batch["image"]) * batch["gain"] + extra[0] - extra[1]


class DictResult(Image):
    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.conv(x)
        return {"out": y, "features": [y.mean(), x.shape[2]], "none": None, "name": "dict"}


class TupleResult(Image):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return y, (x, [y, None]), 3


class Named(NamedTuple):
    out: Tensor
    size: int


class NamedResult(Image):
    def forward(self, x: Tensor) -> Named:
        return Named(self.conv(x), x.shape[0])


@dataclass
class Result:
    out: Tensor
    aux: Tensor | None = None


class DataclassResult(Image):
    def forward(self, x: Tensor) -> Result:
        return Result(self.conv(x), aux=None)


# ---- modes ---------------------------------------------------------------------------------------------------------


class BatchNorm(Image):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class BranchingBatchNorm(BatchNorm):
    """Traced again in the middle of training."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.size(2) % 2 else x.flip(2))


class FrozenBatchNorm(BatchNorm):
    def train(self, mode: bool = True) -> FrozenBatchNorm:
        super().train(mode)
        self.norm.eval()
        return self


class Dropouts(Image):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.drop2d = nn.Dropout(0.3), nn.Dropout2d(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2d(self.drop(self.conv(x))) + F.dropout(x, 0.2, self.training)


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.5) / 0.5


class StochasticDepth(Image):
    def __init__(self) -> None:
        super().__init__()
        self.drop_path = DropPath()
        self.skip_path = Skip()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.conv(x)) + self.skip_path(x)


class Skip(nn.Module):
    """Depends on the mode, under a name that no table knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(x.size(0), 1, 1, 1) if self.training else x * 0.5


class TrainingBranch(Image):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        if self.training:
            return y, y.mean()
        return y


class NoGrad(Image):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.gate(x).sigmoid()
            with torch.enable_grad():
                inner = self.gate(x).mean()
        return self.conv(x) * gate + self.conv(x).detach() + inner


class Decorated(Image):
    @torch.no_grad()
    def statistics(self, x: Tensor) -> Tensor:
        return self.conv(x).std()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) / (self.statistics(x) + 1)


class Autocast(Image):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.conv(x)
        with torch.autocast("cpu", enabled=False):
            return self.conv(y.float())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.drop = nn.Conv2d(4, 4, 1), nn.Dropout(0.5)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        return torch.tanh(self.drop(self.proj(x)) * gain)


class Checkpointed(Image):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        for block in self.blocks:
            y = y + checkpoint(block, y, 0.7, use_reentrant=self.reentrant)
        return y * 2


class CheckpointedClosure(Image):
    """The usual ``create_custom_forward`` of the wild."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        def custom(module: nn.Module) -> Callable[..., Any]:
            return lambda *inputs: (module(*inputs), inputs[0].mean())

        y, mean = checkpoint(custom(self.block), self.conv(x), use_reentrant=False)
        return y + mean


class Twisted(torch.autograd.Function):
    """Its backward is not the derivative of its forward, so that losing it shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: float) -> tuple[Tensor, Tensor]:
        ctx.gain = gain
        return x * gain, x + gain

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, None]:
        return 7 * ctx.gain * first - 3 * second, None


twisted = Twisted.apply  # an alias at the top of a module, as scan code has it


class CustomFunction(Image):
    def forward(self, x: Tensor) -> Tensor:
        a, b = twisted(self.conv(x), 2.0)
        c, _ = Twisted.apply(b, 0.5)
        return a * b + c


# ---- parameters, buffers, attributes -------------------------------------------------------------------------------


class CalledTwice(Image):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(self.conv(x))) + self.conv(x).mean()


class Tied(Image):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(4, 4, 1)
        self.other.weight = self.conv.weight
        self.alias = self.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.alias(x)) + F.conv2d(x, self.other.weight)


class Unused(Image):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 3)
        self.token = nn.Parameter(torch.randn(2))
        self.register_buffer("counter", torch.zeros(1))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ModuleLists(Image):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
        self.named = nn.ModuleDict({"4": nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GELU())})

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for i, layer in enumerate(self.layers):
            x = layer(x) * (i + 1)
            kept.append(x)
        for layer in reversed(self.layers[:2]):
            x = layer(x) + kept.pop()
        return self.named[str(x.size(1))](x)


class RawParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, 5, 4))
        self.square = nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.randn(2, 5))
        self.scale = nn.ParameterList([nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(()))])

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)  # (B, C, L)
        both = torch.stack([tokens, tokens.flip(-1)], dim=1)
        y = torch.einsum("bkcl,kdc->bkdl", both, self.stack) + self.bias[None, :, :, None]
        z = (self.square @ tokens).transpose(1, 2) * self.scale[0]
        z = z + torch.matmul(tokens.mT, self.square.t()) + F.linear(z, self.square, self.scale[0])
        z = z + torch.bmm(z, self.square.expand(x.size(0), -1, -1)) + torch.exp(-self.scale[1].abs())
        return y.sum((1, 2))[..., None] + z


class PlainTensor(Image):
    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.linspace(0, 1, 4).view(1, 4, 1, 1)
        self.tables = [torch.ones(4, 1, 1), torch.arange(4.0).view(4, 1, 1)]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x - self.mean) * self.tables[1] + self.tables[0]


class Rebinds(Image):
    """As MambaIR does."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.full((1, 4, 1, 1), 0.3)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean.type_as(x)
        return self.conv(x - self.mean) + self.mean


class MutatesBuffers(Image):
    count: Tensor
    average: Tensor
    momentum: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("momentum", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        with torch.no_grad():
            self.count += 1
            self.average.mul_(0.9).add_(y.mean((0, 2, 3)), alpha=0.1)
            self.momentum = 0.5 * self.momentum + y.amax((0, 2, 3))
        return y + self.average.view(4, 1, 1) + self.momentum.view(4, 1, 1) * self.count


class ParameterAsNumber(Image):
    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.rand(()) + 1)
        self.register_buffer("power", torch.tensor(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * float(self.k) ** self.power.item()


class Hooked(Image):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.block.register_forward_hook(double)
        self.conv.register_forward_pre_hook(add_one)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.conv(x))


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def add_one(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] + 1,)


class Parametrized(nn.Module):
    """Weight norm: the weight is computed at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm = nn.Linear(4, 12), nn.LayerNorm(4)
        self.leaf = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        B, L, C = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, L, 3, 2, C // 2).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-2, -1) * (C // 2) ** -0.5, dim=-1)
        y = (weights @ v + F.scaled_dot_product_attention(q, k, v)).transpose(1, 2).reshape(B, L, C)
        return y + self.leaf(y, y, y, need_weights=False)[0]


def _call(name: str, make: Callable[[], Args]) -> Call:
    return Call(name, make)


def _image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 4, 6, 5)))


CASES: dict[str, Case] = {
    "reshapes": Case(Reshapes, ANY, compiles=True),
    "size arithmetic": Case(SizeArithmetic, ANY, compiles=True),
    "interpolates": Case(Interpolates, images((2, 4, 8, 6), (1, 4, 8, 6), (3, 4, 7, 5))),
    "item assignment": Case(ItemAssignment, ANY, compiles=True),
    "in place on views": Case(InPlaceOnViews, ANY),
    "list index": Case(ListIndex, ANY),
    "unpacks": Case(Unpacks, ANY),
    "iterates over the batch": Case(IteratesOverBatch, ANY),
    "memory format": Case(MemoryFormat, ANY),
    "factories": Case(Factories, ANY, compiles=True),
    "random": Case(Random, ANY),
    "formats sizes": Case(FormatsSizes, (*ANY, *images((2, 4, 100, 12)))),
    "cache keyed on sizes": Case(SizeCache, ANY),
    "int(H / 2)": Case(HalfSize, ANY),
    "sqrt of a size": Case(SquareRoot, TOKENS),
    "range(size)": Case(RangeLoop, ANY),
    "if size % 2": Case(OddBranch, ANY),
    "compares sizes": Case(SizeBranch, ANY),
    "compares inner sizes": Case(InnerSizeBranch, ANY),
    "isinstance(size, int)": Case(IsInstance, ANY),
    "branches on the dtype": Case(
        DtypeBranch,
        (
            *images((2, 4, 6, 5)),
            *images((3, 4, 6, 5), dtype=torch.float64),
            _call("uint8", lambda: ((torch.randint(0, 256, (2, 4, 5, 5), dtype=torch.uint8),), {})),
            *images((1, 4, 3, 9)),
        ),
    ),
    "flags": Case(
        Flags,
        (
            _call("defaults", lambda: ((_image(),), {})),
            _call("scale", lambda: ((_image(), 0.5), {})),
            _call("mode", lambda: ((_image(1, 4, 3, 3),), {"mode": "square"})),
            _call("flip", lambda: ((_image(),), {"flip": True, "scale": 0.5})),
            _call("defaults again", lambda: ((_image(3, 4, 2, 2), 1.0, "plain"), {"flip": False})),
        ),
    ),
    "keyword inputs": Case(
        Keywords,
        (
            _call("keyword", lambda: ((_image(),), {"mask": _image(2, 1, 6, 5)})),
            _call("swapped", lambda: ((), {"mask": _image(1, 1, 1, 1), "image": _image(1, 4, 3, 8)})),
        ),
    ),
    "optional input": Case(
        Optional,
        (
            _call("without", lambda: ((_image(),), {})),
            _call("with", lambda: ((_image(), _image(2, 1, 6, 5)), {})),
            _call("keyword", lambda: ((_image(1, 4, 2, 2),), {"mask": _image(1, 1, 2, 2)})),
            _call("None", lambda: ((_image(3, 4, 2, 2), None), {})),
        ),
    ),
    "containers as inputs": Case(
        Containers,
        (
            _call("dict", lambda: (({"image": _image(), "gain": 2.0}, [_image(), _image()]), {})),
            _call(
                "gain", lambda: (({"image": _image(1, 4, 3, 3), "gain": 3.0}, [_image(1, 4, 3, 3)] * 2), {})
            ),
        ),
    ),
    "dict result": Case(DictResult, ANY),
    "tuple result": Case(TupleResult, ANY),
    "NamedTuple result": Case(NamedResult, ANY),
    "dataclass result": Case(DataclassResult, ANY),
    "batch norm": Case(BatchNorm, ANY, compiles=True),
    "batch norm and a branch": Case(BranchingBatchNorm, ANY),
    "frozen batch norm": Case(FrozenBatchNorm, ANY),
    "dropout": Case(Dropouts, ANY),
    "stochastic depth": Case(StochasticDepth, ANY),
    "if self.training": Case(TrainingBranch, ANY),
    "no_grad": Case(NoGrad, ANY, compiles=True),
    "no_grad as a decorator": Case(Decorated, ANY),
    "autocast": Case(Autocast, ANY),
    "checkpoint, not reentrant": Case(lambda: Checkpointed(False), ANY),
    "checkpoint, reentrant": Case(lambda: Checkpointed(True), ANY),
    "checkpoint of a closure": Case(CheckpointedClosure, ANY),
    "autograd.Function": Case(CustomFunction, ANY, compiles=True),
    "module called twice": Case(CalledTwice, ANY),
    "tied parameters": Case(Tied, ANY, compiles=True),
    "unused parameters": Case(Unused, ANY),
    "module lists": Case(ModuleLists, ANY, compiles=True),
    "raw parameters": Case(RawParameters, ANY, compiles=True),
    "plain tensor attribute": Case(PlainTensor, ANY, compiles=True),
    "rebinds an attribute": Case(Rebinds, ANY, compiles=True),
    "mutates buffers": Case(MutatesBuffers, ANY),
    "parameter as a number": Case(ParameterAsNumber, ANY),
    "hooks": Case(Hooked, ANY),
    "parametrized": Case(Parametrized, ANY, pickles=False),
    "attention": Case(Attention, TOKENS, compiles=True),
}


# ---- what no graph can hold ----------------------------------------------------------------------------------------


class BranchesOnData(Image):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if y.mean() > 0:  # the line
            return y
        return -y


class ToNumpy(Image):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        values = y.detach().numpy()  # the line
        return y * float(values.max())


class ToList(Image):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y * y.flatten().tolist()[0]  # the line


class ToNumber(Image):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y * float(y.max())  # the line


UNTRACEABLE: tuple[type[nn.Module], ...] = (BranchesOnData, ToNumpy, ToList, ToNumber)
