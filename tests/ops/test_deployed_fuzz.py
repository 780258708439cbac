"""Deployed models with whatever shapes, quantizers and bit widths come together, and files with damage of any kind.

Every call of a kernel is compared with what it stands for, on the values that it gets. A value on a tie may go either
way, so results may be as far apart as steps of the values near one lead to: for projections and convolutions that is
computed, for scans, whose states carry on what one step has changed, there is more room if there is such a value.
"""

from __future__ import annotations

import functools
import json
import math
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, example, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ssmquant
from ssmquant import FormatError, NotCalibratedError, QConfig
from ssmquant.graph.runtime import runtime_of
from ssmquant.modules import PackedTensor, deployed
from ssmquant.ops import selective_scan
from ssmquant.ops.deployed import cpu
from ssmquant.quantizers import DLS
from ssmquant.quantizers.affine import Affine
from tests.graph import deployed as plain
from tests.model_files import activations_of, loaded, meta_of, read, with_meta, with_tensor, written
from tests.small import Scanner, images, prepared_and_calibrated
from tests.strategies import learnt

_reason = cpu.unavailable(torch.device("cpu"))
needs_kernels = pytest.mark.skipif(_reason is not None, reason=str(_reason))
BITS = st.integers(2, 8)
# An example takes a good part of a second, so nothing looks for a smaller one.
few = functools.partial(settings, phases=(Phase.explicit, Phase.reuse, Phase.generate))
METHODS = ("lsq", "dls", "minmax")


@st.composite
def configs(draw: st.DrawFn) -> QConfig:
    weight = draw(st.sampled_from(["rfa", "lsq", "minmax"]))
    shift = draw(st.sampled_from(["learned", "half", "none"])) if weight != "minmax" else "learned"
    return QConfig(
        w_bits=draw(BITS),
        a_bits=draw(BITS),
        scan_bits=draw(BITS),
        weight=weight,
        activation=draw(st.sampled_from(METHODS)),
        scan=draw(st.sampled_from(METHODS)),
        decay=draw(st.sampled_from(["inherit", "ladder", "shared"])),
        granularity=draw(st.sampled_from(["tensor", "channel"])),
        weight_options={} if shift == "learned" else {"shift": shift},
        statistics=draw(st.sampled_from(["sample", "tensor"])),
        keep_first_last=False,
        keep_gates=False,
    )


class Layers(nn.Module):
    """All kinds of layers that kernels know, each on the image itself, so that nothing carries on."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], dilation: int) -> None:
        super().__init__()
        padding = tuple((k - 1) * dilation // 2 for k in kernel)
        options: dict[str, Any] = {"padding": padding, "dilation": dilation}
        # One of a single feature without a bias would make nothing but zeros.
        self.norm, self.gate_norm = nn.LayerNorm(inputs), nn.RMSNorm(inputs, elementwise_affine=inputs < 3)
        self.rows, self.flat = nn.Linear(inputs, outputs, bias=False), nn.Linear(inputs, outputs)
        self.normed, self.gated = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)
        self.acted, self.point = nn.Linear(inputs, outputs), nn.Conv2d(inputs, outputs, 1)
        self.normed_point, self.act_point = nn.Conv2d(inputs, outputs, 1), nn.Conv2d(inputs, outputs, 1)
        self.dense = nn.Conv2d(inputs, outputs, kernel, **options)
        full = tuple((k - 1) * dilation for k in kernel)
        self.strided = nn.Conv2d(inputs, outputs, kernel, (2, 3), full, dilation)
        self.depth = nn.Conv2d(inputs, inputs, kernel, groups=inputs, bias=outputs % 2 > 0, **options)
        self.act = nn.GELU() if dilation > 1 else nn.SiLU()
        self.gain, self.channel_gain = nn.Parameter(torch.randn(outputs)), nn.Parameter(torch.randn(inputs))
        for p in (*self.norm.parameters(), *self.gate_norm.parameters()):
            nn.init.normal_(p)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rows, last = x.flatten(2).transpose(1, 2), x.permute(0, 2, 3, 1)
        more = rows.mean(-1, keepdim=True).expand(-1, -1, len(self.gain))
        return (
            self.rows(rows),
            self.flat(rows.flatten(0, 1)),
            self.normed(self.norm(rows)) + more * self.gain,
            self.gated(self.gate_norm(rows) * F.silu(rows.flip(1))) + more,
            (F.gelu if len(self.gain) % 2 else F.silu)(self.acted(rows)) + more,
            self.point(x),
            self.act(self.act_point(x)),
            self.act(self.normed_point(self.norm(last).permute(0, 3, 1, 2))),
            self.dense(x),
            self.strided(x),
            self.act(self.depth(x)),
            last * self.channel_gain + (x * x.mean((2, 3), keepdim=True)).permute(0, 2, 3, 1),
        )


class Scans(nn.Module):
    """SS2D's core: an image in four orders, their scans, the sum of these."""

    def __init__(self, channels: int, states: int, rank: int) -> None:
        super().__init__()
        self.sizes = rank, states, states
        self.x_proj = nn.Parameter(torch.randn(4, rank + 2 * states, channels) / channels**0.5)
        self.dt_proj = nn.Parameter(torch.randn(4, channels, rank) / rank**0.5)
        self.bias, self.D = (
            nn.Parameter(torch.rand(4 * channels) - 2),
            nn.Parameter(torch.randn(4 * channels)),
        )
        self.A_log = nn.Parameter(
            torch.log(torch.arange(states) + 1.0 + 0.1 * torch.rand(4 * channels, states))
        )
        self.norm, self.out = nn.LayerNorm(channels), nn.Linear(channels, 3)
        nn.init.normal_(self.norm.bias)  # the norm of a single channel is nothing but that

    def forward(self, x: Tensor) -> Tensor:
        B, D, H, W = x.shape
        L = H * W
        rows = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], 1)
        xs = torch.cat([rows, rows.flip(-1)], 1)
        dts, Bs, Cs = torch.split(torch.einsum("bkdl,kcd->bkcl", xs, self.x_proj), self.sizes, dim=2)
        dts = torch.einsum("bkrl,kdr->bkdl", dts, self.dt_proj)
        y: Any = selective_scan(
            xs.reshape(B, -1, L), dts.reshape(B, -1, L), -self.A_log.exp(), Bs.contiguous(), Cs.contiguous(), self.D,
            delta_bias=self.bias, delta_softplus=True,
        )  # fmt: skip
        y = y.view(B, 4, D, L)
        y = y[:, :2] + y[:, 2:].flip(-1)
        y = y[:, 0] + y[:, 1].view(B, D, W, H).transpose(2, 3).reshape(B, D, L)
        return self.out(self.norm(y.transpose(1, 2)))


def converted(model: nn.Module, config: QConfig, x: Tensor, frozen: bool) -> Any:
    prepared = prepared_and_calibrated(model.eval(), config, x)
    for wrapper in runtime_of(prepared).activations.values():  # ranges that no search has found
        learnt(wrapper.quantizer, amount=0.2)
    try:
        return ssmquant.convert(prepared, dls="frozen" if frozen else "dynamic")
    except NotCalibratedError:  # quantized values in front of it were nothing but zeros
        reject()


# ---- how far apart results may be ------------------------------------------------------------------------------------


@contextmanager
def quantized(by: Callable[[Any, Tensor, int], Tensor]) -> Iterator[None]:
    """What the plain forms of kernels read in place of quantized values."""

    def read(x: Tensor, module: nn.Module, copies: int = 1) -> Tensor:
        return by(getattr(module, "quantizer", module), x, copies)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "quantized", read)
        yield


def affine_of(q: Any, x: Tensor, copies: int) -> Affine:
    return q._affine(torch.cat([x] * copies, -1) if isinstance(q, DLS) else x)


def ties(q: Any, x: Tensor, copies: int, rounding: float) -> tuple[Tensor, Tensor]:
    """Where a value is near a tie, and the step there. ``rounding``: of values, of those that the codes cover."""
    affine = affine_of(q, x, copies)
    u = (x + affine.shift) / affine.scale
    near = ((u - u.floor()) - 0.5).abs() < rounding * 2**q.bits
    return near & (u > q.qmin - 1) & (u < q.qmax + 1), affine.scale


def steps(q: Any, x: Tensor, copies: int) -> Tensor:
    near, step = ties(q, x, copies, 2e-5)
    return near * step


def magnitudes(q: Any, x: Tensor, copies: int) -> Tensor:
    """Of what kernels add up: codes, and what belongs to shifts."""
    affine = affine_of(q, x, copies)
    return (affine.scale * 2**q.bits + affine.shift.abs()).expand(x.shape)


class Weight:
    """In place of a packed one: magnitudes of its values, or of what kernels make them of."""

    def __init__(self, weight: PackedTensor, parts: bool) -> None:
        q = weight.qtensor()
        codes = (q.scale.abs() * 2**weight.bits + q.shift.abs()).expand(weight.shape)
        self.values, self.shape = codes if parts else weight().abs(), weight.shape

    def __call__(self) -> Tensor:
        return self.values


def allowed(name: str, args: tuple[Any, ...]) -> Tensor:
    """How far apart results may be, but for those of scans."""
    if name == "blend":
        return 4e-7 * plain.plain_blend(*(None if t is None else t.abs() for t in args))

    def total(of: Callable[[Any, Tensor, int], Tensor], parts: bool) -> Tensor:
        """What comes of ``of`` each value, and, with ``parts``, of what is added to that."""
        given = [Weight(a, parts) if isinstance(a, PackedTensor) else a for a in args]
        bias, act, last = {"linear": (3, 5, 7), "gated_linear": (5, 9, 6), "conv2d": (3, 5, 9)}[name]
        given[bias] = args[bias].abs() if parts and args[bias] is not None else None
        if len(given) > act:  # of slopes up to 1.13
            given[act] = None
        if len(given) > last and given[last] is not None:  # a sum with that, times a gain
            given[last] = tuple(None if t is None else t.abs() for t in args[last]) if parts else None
        with quantized(of):
            return plain.PLAIN[name](*given)

    return 1.2 * total(steps, False) + 4e-7 * total(magnitudes, True)


@contextmanager
def compared() -> Iterator[dict[str, int]]:
    """Compares all calls of kernels; counts them, and those of scans that had no tie."""
    calls = {**dict.fromkeys(plain.PLAIN, 0), "exact": 0}
    inside = False

    def watch(name: str) -> Callable[..., Tensor]:
        real, want_of = getattr(deployed, name), plain.PLAIN[name]

        def call(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal inside
            got: Tensor = real(*args, **kwargs)
            if inside:
                return got
            inside = True
            try:
                check(got, args, kwargs)
            finally:
                inside = False
            calls[name] += 1
            return got

        def check(got: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            lowest = 8
            count = 0

            def and_ties(q: Any, x: Tensor, copies: int) -> Tensor:
                nonlocal lowest, count
                lowest = min(lowest, q.bits)
                count += int(ties(q, x, copies, 1e-6)[0].sum())
                return q(x, copies=copies)

            with quantized(and_ties):
                want = want_of(*args, **kwargs)
            assert got.shape == want.shape
            assert got.isfinite().all()
            error = (got - want).abs()
            if name.endswith("_core"):
                relative = float(error.norm() / want.norm().clamp(min=1e-6))
                assert relative < (2.0 ** (1 - lowest) if count else 5e-6), (name, count, lowest)
                calls["exact"] += count == 0
            else:
                most = allowed(name, args)
                assert (error <= most).all(), (name, float((error / most).max()))

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in plain.PLAIN:
            patch.setattr(deployed, name, watch(name))
        yield calls


SIZES = st.integers(1, 7)
WIDTHS = st.sampled_from([1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 40])


@needs_kernels
@few(max_examples=10)
@given(
    configs(),
    WIDTHS,
    WIDTHS,
    st.sampled_from([((3, 3), 1), ((1, 3), 2), ((5, 3), 1)]),
    st.sampled_from([1, 3]),
    st.lists(st.tuples(SIZES, SIZES), min_size=2, max_size=4),
    st.booleans(),
    st.integers(0, 1000),
)
def test_layers(
    config: QConfig, inputs: int, outputs: int, window: Any, batch: int, sizes: list[tuple[int, int]], frozen: bool,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    model = converted(
        Layers(inputs, outputs, *window), config, torch.randn(batch, inputs, *sizes[0]) + 0.1, frozen
    )
    with compared() as calls:
        for i, size in enumerate(sizes):
            x = torch.randn(1 + i % 3, inputs, *size)
            with torch.no_grad():
                got = model(x.contiguous(memory_format=torch.channels_last) if i % 2 else x)
            want = plain.unfused(model, x)
            assert [t.shape for t in got] == [t.shape for t in want]
    assert calls["linear"] >= 4 * len(sizes)
    assert calls["gated_linear"] == len(sizes)
    assert calls["blend"] == len(sizes) or sizes[0] == (1, 1)
    assert calls["conv2d"] >= 2 * len(sizes) * (inputs > 1)  # of one channel, a convolution stays as it is


@needs_kernels
@few(max_examples=8)
@example(QConfig.recommended(4, 4, keep_first_last=False), 17, 10, 3, 3, [(5, 7), (6, 6)], False, 0)
@example(QConfig.recommended(2, 2, keep_first_last=False), 20, 16, 4, 1, [(7, 6), (4, 3)], False, 1)
@given(
    configs(),
    WIDTHS,
    st.sampled_from([1, 2, 3, 4, 8, 10, 16, 17]),
    st.integers(1, 6),
    st.sampled_from([1, 3]),
    st.lists(st.tuples(SIZES, SIZES), min_size=2, max_size=3),
    st.booleans(),
    st.integers(0, 1000),
)
def test_scans(
    config: QConfig, channels: int, states: int, rank: int, batch: int, sizes: list[tuple[int, int]], frozen: bool,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    model = converted(Scans(channels, states, rank), config, torch.randn(batch, channels, *sizes[0]), frozen)
    with compared() as calls:
        for i, size in enumerate(sizes):
            x = torch.randn(1 + 2 * (i % 2), channels, *size)
            with torch.no_grad():
                assert model(x).shape == plain.unfused(model, x).shape
    known = frozen or config.activation != "dls"  # kernels multiply by codes of the low rank
    assert calls["scan_core"] == len(sizes) * known or min(channels, *sizes[0]) == 1


@needs_kernels
@few(max_examples=4)
@given(
    configs(), st.sampled_from(["linear", "matmul", "both", "behind"]), st.booleans(), st.integers(0, 1000)
)
def test_sequences(config: QConfig, form: str, frozen: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model = converted(plain.MambaBlock(form), config, torch.randn(2, 6, 4, 3), frozen)
    with compared() as calls:
        for shape in ((2, 6, 4, 3), (1, 6, 5, 7), (3, 6, 1, 1)):
            x = torch.randn(shape)
            with torch.no_grad():
                assert model(x).shape == plain.unfused(model, x).shape
    if frozen or config.activation != "dls":
        assert calls["sequence_core"] == (6 if form == "both" else 3)


# ---- files -----------------------------------------------------------------------------------------------------------

X = images(2, 3, 6, 5)


def model() -> Scanner:
    return Scanner(16, 8)


@functools.cache
def file_of(bits: int, scan: str = "lsq", frozen: bool = False) -> bytes:
    torch.manual_seed(0)
    return written(converted(model(), QConfig.recommended(bits, bits, scan=scan), X, frozen))


@functools.cache
def areas(content: bytes) -> list[tuple[int, int]]:
    """Where the parts of a file lie: the size of the header, the header, and each tensor."""
    size = int.from_bytes(content[:8], "little")
    tensors = [v["data_offsets"] for k, v in json.loads(content[8 : 8 + size]).items() if k != "__metadata__"]
    return [(0, 8), (8, 8 + size), *((8 + size + a, 8 + size + b) for a, b in tensors)]


def check(content: bytes) -> bool:
    """Refused as what it is, or a model that runs, whatever its numbers are; whether it is one."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = loaded(content, model())
    except FormatError as error:
        assert str(error)  # noqa: PT017
        return False
    else:
        with torch.no_grad():
            for y in (found(X), plain.unfused(found, X)):
                assert y.shape == X.shape
        return True
    finally:
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB on Linux


FROZEN = (8, "dls", True)
KINDS = ((2,), (4,), (8,), (4, "dls"), FROZEN, (2, "minmax"))
FILES = st.sampled_from(KINDS)


@few(max_examples=40)
@given(FILES, st.data())
def test_truncated_files(kind: Any, data: st.DataObject) -> None:
    content = file_of(*kind)
    assert not check(content[: data.draw(st.integers(0, len(content) - 1))])


@few(max_examples=25)
@given(FILES, st.data())
def test_files_with_another_byte(kind: Any, data: st.DataObject) -> None:
    content = bytearray(file_of(*kind))
    first, end = data.draw(st.sampled_from(areas(file_of(*kind))))
    content[data.draw(st.integers(first, end - 1))] ^= data.draw(st.integers(1, 255))
    check(bytes(content))


@few(max_examples=30)
@given(FILES, st.data())
def test_files_with_another_byte_in_the_metadata(kind: Any, data: st.DataObject) -> None:
    content = file_of(*kind)
    text = bytearray(json.dumps(meta_of(content)).encode())
    # Mostly what leaves it JSON.
    text[data.draw(st.integers(0, len(text) - 1))] = data.draw(
        st.sampled_from(b'0123456789-.eE ux",:[]{}\\\0\xff')
    )
    check(with_meta(content, bytes(text)))


NUMBERS = st.sampled_from([0.0, -0.0, -1.0, 1e-45, -1e-30, 1e38, -3e38, math.nan, math.inf, -math.inf])


def states(content: bytes) -> list[str]:
    """What the numbers in a file's ``quantizers`` are."""
    names = [name for e in meta_of(content)["points"] for name in e.get("values", ())]
    assert len(names) == len(read(content)[0]["quantizers"])  # one number each
    return names


def with_number(content: bytes, key: str, at: int, value: float) -> bytes:
    def change(t: Tensor) -> Tensor:
        t[at] = value
        return t

    return with_tensor(content, key, change)


@few(max_examples=20)
@given(FILES, st.data())
def test_files_with_another_number(kind: Any, data: st.DataObject) -> None:
    content = file_of(*kind)
    key = data.draw(st.sampled_from(["scales", "quantizers", "float32"]))
    at = data.draw(st.integers(0, len(read(content)[0][key]) - 1))
    check(with_number(content, key, at, data.draw(NUMBERS)))


def test_a_file_whose_quantizer_has_no_range() -> None:
    meta = meta_of(file_of(4))
    activations_of(meta)[0]["flags"]["initialized"] = False
    with pytest.raises(FormatError, match="has no range"):
        loaded(with_meta(file_of(4), json.dumps(meta).encode()), model())


@needs_kernels
@pytest.mark.parametrize(("name", "value"), [("alpha", 0.0), ("lo", -3e38), ("hi", 3e38)])
def test_a_file_with_a_frozen_range_out_of_reach(name: str, value: float) -> None:
    content = file_of(*FROZEN)
    last = max(i for i, n in enumerate(states(content)) if n == name)  # first come those of LSQ
    check(with_number(content, "quantizers", last, value))


@pytest.mark.parametrize("kind", KINDS)
def test_files_as_they_were_written_load(kind: Any) -> None:
    assert check(file_of(*kind))
