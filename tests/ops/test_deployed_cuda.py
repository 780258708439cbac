"""The CUDA kernels of deployed models against those for the CPU, which other tests hold to PyTorch in float64.

CUDA C++ is run by a CPU (``emulator``), Triton by its interpreter; both are compiled for an H100, and run on a GPU if
there is one.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssmquant
from ssmquant import QConfig, zoo
from ssmquant.errors import InputError
from ssmquant.graph import runtime
from ssmquant.modules import deployed, deployed_norms, deployed_scans, deployed_values
from ssmquant.ops import nvrtc, use_backend
from ssmquant.ops.deployed import Depthwise, Grid, Norm, cpu, cuda, cuda_depthwise, cuda_thin
from ssmquant.ops.deployed.cuda_scan import Case, choose
from tests.ops.deployed_cpu import close, make_grid, off_ties
from tests.ops.deployed_cuda import Operands, as_codes, emulated, poison, same_codes, there_is
from tests.ops.interpreted import in_process, make_interpreter_work

_reason = cpu.unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


# ---- depthwise convolutions ------------------------------------------------------------------------------------------


def check_depthwise(device: str, sizes: tuple[int, ...], kernel: Any, dilation: Any, act: str | None) -> None:
    channels = sizes[3]
    grid = make_grid(4, 1)
    x = off_ties(torch.randn(sizes), grid)
    weights, bias = torch.randn(kernel[0] * kernel[1], channels), torch.randn(channels)
    want = cpu.depthwise(x, grid, cpu.by_lanes(weights), cpu.by_lanes(bias), kernel, dilation, act)
    there = Grid(grid.scale.to(device), grid.shift.to(device), grid.qmin, grid.qmax)
    for given_x in (x, x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):
        operands = given_x.to(device), there, weights.to(device), bias.to(device)
        close(cuda_depthwise.depthwise(*operands, kernel, dilation, act).cpu(), want.double())
    y, parts = cuda_depthwise.depthwise(*operands, kernel, dilation, act, sums=True)
    close(y.cpu(), want.double())
    size = want.double().abs().sum((1, 2)).clamp(min=1)
    error = (parts.double().sum(1).cpu() - want.double().sum((1, 2))).abs()
    assert float((error / size).max()) < 2e-6
    x[0, -1, -1, channels // 2] = math.nan
    want = cpu.depthwise(x, grid, cpu.by_lanes(weights), cpu.by_lanes(bias), kernel, dilation, act)
    following = make_grid(5, 1)
    wide = torch.full((*sizes[:3], channels + 16), 99, dtype=torch.int8)
    for coded in (as_codes(x, grid), wide[..., :channels].copy_(as_codes(x, grid))):
        operands = coded.to(device), there, weights.to(device), bias.to(device), kernel, dilation, act
        got = cuda_depthwise.depthwise(*operands).cpu()
        assert torch.equal(got.isnan(), want.isnan())
        close(got.nan_to_num(), want.nan_to_num().double())
        written = cuda_depthwise.depthwise(*operands, there_is(following, device)).cpu()
        same_codes(written, as_codes(got, following))
        assert written.min() == -1  # and nothing else for NaN
        factors = torch.rand(channels) + 0.5
        written = cuda_depthwise.depthwise(*operands, there_is(following, device), factors.to(device)).cpu()
        same_codes(written, as_codes(got * factors, following))
        grids = there_is(following, device), factors.to(device), there_is(grid, device)
        written, other = cuda_depthwise.depthwise(*operands, *grids)
        same_codes(written, as_codes(got * factors, following))
        same_codes(other, as_codes(got, grid))


@pytest.mark.parametrize("units", [132, 1])  # small tiles, and large ones
@pytest.mark.parametrize(
    ("sizes", "kernel", "dilation", "act"),
    [
        ((2, 9, 19, 20), (3, 3), (1, 1), "silu"),
        ((1, 9, 7, 30), (3, 3), (1, 1), None),
        ((1, 17, 5, 3), (5, 3), (1, 2), "gelu"),
        ((2, 1, 70, 33), (1, 7), (1, 1), None),
        ((1, 1, 1, 1), (3, 3), (2, 2), None),
        ((1, 18, 21, 60), (3, 3), (2, 2), "gelu"),
        ((1, 40, 33, 72), (3, 3), (1, 1), "silu"),
        ((3, 5, 18, 7), (3, 3), (1, 1), "silu"),
        ((2, 20, 3, 6), (3, 5), (3, 1), "gelu"),
        ((1, 12, 11, 4), (7, 7), (1, 1), None),
        ((1, 1, 40, 8), (3, 3), (1, 2), None),
        ((1, 50, 1, 12), (3, 3), (1, 1), "silu"),
        ((2, 1, 300, 64), (1, 7), (1, 2), "silu"),
        ((1, 9, 8, 20), (3, 3), (5, 6), None),
    ],
)
def test_depthwise(
    by_cpu: None,
    monkeypatch: pytest.MonkeyPatch,
    sizes: Any,
    kernel: Any,
    dilation: Any,
    act: str | None,
    units: int,
) -> None:
    monkeypatch.setattr(cuda_depthwise, "_tile", cuda_depthwise._tile.__wrapped__)
    monkeypatch.setattr(cuda_depthwise, "UNITS", units)
    torch.manual_seed(0)
    check_depthwise("cpu", sizes, kernel, dilation, act)


def test_depthwise_keeps_nan(by_cpu: None) -> None:
    x = torch.randn(1, 8, 8, 4)
    x[0, 4, 4, 1] = math.nan
    y = cuda_depthwise.depthwise(x, make_grid(4, 1), torch.ones(9, 4), torch.zeros(4), (3, 3), (1, 1), "gelu")
    assert y[0, 3:6, 3:6, 1].isnan().all()
    assert int(y.isnan().sum()) == 9


# ---- Triton ----------------------------------------------------------------------------------------------------------


def check_projection(
    device: str, bits: int, batch: int, rows: int, inputs: int, outputs: int, every: bool
) -> None:
    """With all norms, gates, activations and residuals; not ``every`` one of their combinations."""
    operands, grid, bias = (
        Operands.weight((outputs, inputs), bits, 1.0),
        make_grid(bits, 1),
        torch.randn(outputs),
    )
    wide, z, held = (torch.randn(batch, rows, n) for n in (2 * inputs, inputs, outputs))
    x, gain = off_ties(wide[..., :inputs].unsqueeze(2), grid).squeeze(2), torch.randn(outputs)
    weight, shift = torch.rand(inputs) + 0.5, torch.ones(inputs)

    def run(engine: Any, to: Any, norm: Any, gate: bool, act: str | None, residual: Any) -> Tensor:
        there = Grid(to(grid.scale), to(grid.shift), grid.qmin, grid.qmax)
        made: Tensor = engine.project(
            to(x),
            there,
            engine.pack(*map(to, operands)),
            engine.by_lanes(to(bias)),
            norm=None if norm is None else Norm(to(weight), to(shift) if norm == {} else None, 1e-5, **norm),
            z=to(z) if gate else None,
            act=act,
            residual=None if residual is None else tuple(None if t is None else to(t) for t in residual),
        )
        return made.cpu()

    norms = (None, {}, {"rms": True}, {"factors": True})
    ends: Any = ((None, (held, gain)), ("gelu", None), ("silu", (held, None)))
    cases = list(product(norms, (False, True), ends))
    for norm, gate, (act, residual) in cases if every else cases[::5]:
        got = run(cuda, lambda t: t.to(device), norm, gate, act, residual)
        want = run(cpu, lambda t: t, norm, gate, act, residual)
        # A norm or a gate moves values, and then a code may fall on the other side of a tie.
        close(got, want.double(), 2e-6 if norm is None and not gate else 2e-3)


def check_codes_between(device: str, inputs: int, outputs: int, columns: int) -> None:
    """Codes for floats, of what is read and of what is written; sums of several tensors."""
    grid, following = make_grid(4, 1), make_grid(5, 1)
    weights = cuda.pack(*(t.to(device) for t in Operands.weight((outputs, inputs), 4, 1.0)))
    grids = there_is(grid, device), there_is(following, device)
    parts = torch.randn(3, 2, 17, inputs)
    x = off_ties(parts.sum(0).unsqueeze(2), grid).squeeze(2)
    parts[0] += x - parts.sum(0)
    x[1, 3, 4] = parts[1, 1, 3, 4] = math.nan
    whole = cuda.project(x.to(device), grids[0], weights)
    there = parts.to(device)
    summed = cuda.project(there[0], grids[0], weights, more=(there[1], there[2]))
    close(summed.cpu().nan_to_num(), whole.cpu().nan_to_num().double())
    apart = there[1].clone().transpose(0, 1).contiguous().transpose(0, 1)
    other = cuda.project(there[0], grids[0], weights, more=(apart, there[2]))
    close(other.cpu().nan_to_num(), whole.cpu().nan_to_num().double())
    given = as_codes(x, grid).to(device)
    for codes in (given, given.transpose(0, 1).contiguous().transpose(0, 1)):
        coded = cuda.project(codes, grids[0], weights)
        close(coded.cpu().nan_to_num(), whole.cpu().nan_to_num().double())
        assert torch.equal(coded.isnan(), whole.isnan())
    for factors in (None, torch.rand(columns) + 0.5):
        there = None if factors is None else factors.to(device)
        codes, rest = cuda.project(x.to(device), grids[0], weights, codes=(grids[1], columns, there))
        first = whole[..., :columns].cpu()
        same_codes(codes, as_codes(first if factors is None else first * factors, following))
        close(rest.cpu().nan_to_num(), whole[..., columns:].cpu().nan_to_num().double())


def check_codes_by_triton(device: str) -> None:
    without_thin(check_codes_between, device, 20, 44, 22)
    check_codes_between(device, 300, 70, 1)


def without_thin(check: Any, *args: Any) -> None:
    """By Triton what CUDA C++ is for otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_thin, "takes", lambda *_: False)
        check(*args)


def check_projections(device: str) -> None:
    for sizes in ((2, 1, 50, 60, 144), (4, 2, 17, 72, 60), (8, 1, 33, 300, 20), (8, 2, 19, 40, 270)):
        without_thin(check_projection, device, *sizes, device == "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_MOST_OF_ROW", 250)  # more inputs than a block has at once
        check_projection(device, 4, 2, 17, 300, 20, False)


def check_thin(device: str) -> None:
    for sizes in (
        (2, 1, 50, 60, 144),
        (4, 2, 17, 72, 60),
        (8, 1, 33, 30, 7),
        (4, 1, 5, 9, 22),
        (8, 3, 40, 192, 40),
    ):
        check_projection(device, *sizes, sizes[3] in (9, 60))
    for columns in ((60, 30, 30), (20, 44, 22), (18, 9, 7)):
        check_codes_between(device, *columns)
    check_cores(device, dense=True)


def test_thin_projections(by_cpu: None) -> None:
    torch.manual_seed(0)
    check_thin("cpu")


def check_convolutions(device: str) -> None:
    for bits in (2, 8):
        grid = make_grid(bits, 1)
        x, bias = off_ties(torch.randn(2, 9, 8, 12), grid), torch.randn(10)
        _, scale, shift = Operands.weight((1, 10, 12), bits, 1.0)
        half = 2 ** (bits - 1)
        operands = (
            torch.randint(-half, half, (6, 10, 12), dtype=torch.int8),
            scale.expand(6, 10),
            shift.expand(6, 10),
        )
        sizes: Any = ((3, 2), (1, 2), (2, 1), (1, 2))
        want = cpu.convolve(x, grid, cpu.pack(*operands), cpu.by_lanes(bias), *sizes)
        there = Grid(grid.scale.to(device), grid.shift.to(device), grid.qmin, grid.qmax)
        packed = cuda.pack(*(t.to(device) for t in operands))
        for given_x in (x, x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):
            close(
                cuda.convolve(given_x.to(device), there, packed, bias.to(device), *sizes).cpu(), want.double()
            )
            held = torch.randn(len(x), want.shape[3], want[0, :, :, 0].numel()).transpose(1, 2)
            for residual in (held.to(device), held.contiguous().to(device)):
                got = cuda.convolve(
                    given_x.to(device), there, packed, bias.to(device), *sizes, residual=residual
                )
                close(got.cpu(), (want + held.view(want.shape)).double())
        x[1, 2, 3, 4] = math.nan
        got = cuda.convolve(x.to(device), there, packed, None, *sizes).cpu()
        assert torch.equal(got.isnan(), cpu.convolve(x, grid, cpu.pack(*operands), None, *sizes).isnan())
        if bits == 2:  # codes are what at most 7 bits are handed on as
            codes = as_codes(x, grid).to(device)
            for given_codes in (codes, codes.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):
                coded = cuda.convolve(given_codes, there, packed, None, *sizes).cpu()
                close(coded.nan_to_num(), got.nan_to_num().double())
                assert torch.equal(coded.isnan(), got.isnan())


def check_attention(device: str) -> None:
    x, v, scale, gain = torch.randn(2, 100, 12), torch.randn(2, 12, 100), torch.rand(2, 12), torch.randn(12)
    there = [t.to(device) for t in (x, gain, v.transpose(1, 2).contiguous(), scale)]
    close(cuda.blend(*there).cpu(), (x * gain + v.transpose(1, 2) * scale[:, None]).double())
    first, a, second, b = torch.randn(5, 12), torch.randn(5), torch.randn(12, 5), torch.randn(12)
    want = torch.sigmoid(F.relu(v.mean(2) @ first.T + a) @ second.T + b)
    close(
        cuda.excite(v.to(device).transpose(1, 2), *(t.to(device) for t in (first, a, second, b))).cpu(),
        want.double(),
    )
    parts = torch.stack([t.sum(2) for t in v.split(33, 2)], 1)  # of which it makes the mean, without x
    given = [t.to(device) for t in (torch.full_like(v, math.nan).transpose(1, 2), first, a, second, b, parts)]
    close(cuda.excite(*given).cpu(), want.double())


def check_norms(device: str) -> None:
    def checked(
        x: Tensor,
        there: Tensor,
        norm: Norm,
        tolerance: float = 2e-5,
        before: Tensor | None = None,
        act: str | None = None,
    ) -> None:
        columns = x.shape[2]
        x = x if before is None else x + before
        of_it = [None if t is None else t.double() for t in (norm.weight, norm.bias)]
        if norm.rms:
            want = F.rms_norm(x.double(), (columns,), of_it[0], norm.eps)
        else:
            want = F.layer_norm(x.double(), (columns,), of_it[0], of_it[1], norm.eps)
        want = want if act is None else {"silu": F.silu, "gelu": F.gelu}[act](want)
        weight, bias, first = (None if t is None else t.to(device) for t in (norm.weight, norm.bias, before))
        assert cuda.normalizes(there)
        got = cuda.normalize(there, Norm(weight, bias, norm.eps, norm.rms), first, act)
        assert got.is_contiguous()
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=tolerance, equal_nan=True)

    for rows, columns in ((1, 7), (49, 60), (197, 96), (49, 180), (197, 7), (3, 1000), (1, 1)):
        x = torch.randn(2, rows, columns) * 3 + 1
        x[0, rows // 2] *= 1e-3  # where eps matters
        if rows > 1:
            x[1, rows // 2, columns // 2] = math.nan
        weight, bias = torch.randn(columns), torch.randn(columns)
        there = x.to(device)
        image = there.transpose(1, 2).contiguous().transpose(1, 2)
        wide = torch.full((2, rows + 3, 2 * columns + 1), 5.0, device=device)
        sliced, apart = wide[:, 1 : rows + 1, 1 : columns + 1], wide[:, 2 : rows + 2, 1::2]
        norms = (
            Norm(weight, bias, 1e-5), Norm(weight, None, 1e-3), Norm(None, None, 1e-5), Norm(weight, None, 1e-6, True),
            Norm(None, None, 1e-3, True),
        )  # fmt: skip
        for i, layout in enumerate((there, image, sliced, apart)):
            layout.copy_(there)
            for norm in norms if columns == 60 else (norms[i], norms[-2]):
                checked(x, layout, norm)
            checked(x, layout, norms[i], before=torch.randn(columns), act=(None, "silu", "gelu", "gelu")[i])
    same = torch.randn(1, 5, 1, device=device).expand(3, 5, 12)
    checked(same.cpu(), same, norms[2], 2e-4)  # an ulp of the mean, by 1 / sqrt(eps)


def check_norms_of_images(device: str, launched: list[str]) -> None:
    """Behind a convolution, whose bias the kernel adds, unless there is a hook; with an activation, likewise."""
    convolution = nn.Conv2d(3, 12, 3, stride=2, padding=1).to(device)
    layer, act = nn.LayerNorm(12).to(device), nn.GELU()
    nn.init.normal_(layer.bias)
    image = torch.randn(2, 3, 9, 7, device=device)

    def plainly() -> Tensor:
        rows = layer(convolution(image).permute(0, 2, 3, 1))
        return act(rows.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def agree(kernels: int) -> None:
        launched.clear()
        got = deployed.normalize(image, (layer,), convolution, act, 1)
        assert launched == ["normalize"] * kernels
        torch.testing.assert_close(got, plainly(), rtol=1e-4, atol=1e-4 if device != "cpu" else 1e-5)

    agree(1)
    shapes = []
    for module, kernels in ((convolution, 1), (act, 1), (layer, 0)):
        handle = module.register_forward_hook(lambda module, args, out: shapes.append(out.shape) or out * 2)
        agree(kernels)
        handle.remove()
    assert shapes[:4] == [(2, 12, 5, 4)] * 4  # as in the graph: channels first
    convolution.bias = None
    agree(1)


def check_called_norms(device: str) -> None:
    """What graphs call: tensors of any number of axes, and norms that have to be called themselves."""
    launched: list[str] = []
    plain = cuda._launch

    def launch(name: str, *args: Any) -> None:
        launched.append(name)
        plain(name, *args)

    def agree(x: Tensor, kernels: int, *norms: tuple[tuple[Any, ...], Any]) -> None:
        for norm, function in norms:
            launched.clear()
            got, want = deployed.normalize(x, norm), function(x)
            assert launched == ["normalize"] * kernels
            assert got.dtype == want.dtype
            assert got.is_contiguous() or not kernels
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    weight, bias = torch.randn(12, device=device), torch.randn(12, device=device)
    layer, rms = nn.LayerNorm(12).to(device), nn.RMSNorm(12).to(device)
    for module in (layer, rms):
        nn.init.normal_(module.weight)
    every: Any = (
        ((layer,), layer),
        ((rms,), rms),
        ((False, weight, bias, 1e-3), lambda x: F.layer_norm(x, (12,), weight, bias, 1e-3)),
        ((True, weight, None, None), lambda x: F.rms_norm(x, (12,), weight)),
    )
    image, rows = torch.randn(2, 12, 6, 8, device=device), torch.randn(3, 12, device=device)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        patch.setattr(cuda, "_launch", launch)
        patch.setattr(deployed_norms, "engine_of", lambda _: cuda)
        for x in (
            image.permute(0, 2, 3, 1), image[:, :, 1:5, 2:7].permute(0, 2, 3, 1), image.flatten(2).transpose(1, 2),
            image.view(2, 12, 3, 2, 4, 2).permute(0, 2, 4, 3, 5, 1), image[0, :, 0].T, image[0, :, 0, 0],
        ):  # fmt: skip
            agree(x, 1, *every)
        agree(image[:0].permute(0, 2, 3, 1), 0, *every)
        wide = nn.LayerNorm(1200).to(device)
        agree(torch.randn(3, 1200, device=device), 0, ((wide,), wide))
        for norm in ((layer,), (rms,), every[2][0]):
            with pytest.raises(RuntimeError):  # as ever
                deployed.normalize(rows[:, :4], norm)
        agree(rows.double(), 0, ((layer.double(),), layer))
        agree(rows, 1, ((layer.float(),), layer))
        for act in ("silu", "gelu", nn.GELU(), nn.SiLU()):
            function = act if isinstance(act, nn.Module) else getattr(F, act)
            for norm, plain_norm in every[:3]:
                launched.clear()
                got = deployed.normalize(rows, norm, act=act)
                assert launched == ["normalize"]
                torch.testing.assert_close(got, function(plain_norm(rows)), rtol=1e-5, atol=1e-5)
        check_norms_of_images(device, launched)
        layer.register_forward_hook(lambda module, args, out: out + 1)
        agree(rows, 0, ((layer,), layer))


def check_cores(device: str, dense: bool = False) -> None:
    """``dense``: channels are next to each other."""
    for bits, states in ((2, 5), (4, 1), (8, 4)):
        operands = Operands(2, 40, 12, states, 3, bits=bits, device=device)
        x = off_ties(torch.randn(2, 12, 40)[..., None], operands.of_u)[..., 0].transpose(1, 2)
        x = x.contiguous() if dense else x
        ours, theirs = operands.core(cuda), operands.core(cpu)
        close(
            ours(x.to(device)).cpu(), theirs(x).double(), 2e-2
        )  # some codes of the projection are near a tie
        x[0, 20, 3] = math.nan
        got, want = ours(x.to(device)).cpu(), theirs(x)
        assert got[0].isnan().all()
        assert torch.equal(got.isnan(), want.isnan())
        if bits < 8:
            grids = operands.of_x, operands.of_u
            codes, of_scan = (as_codes(x, g).to(device) for g in grids)
            assert torch.equal(ours(codes, of_scan).cpu().nan_to_num(), got.nan_to_num())
            ours, codes = operands.core(cuda, one=True), as_codes(x, operands.of_u)
            want = ours(x.to(device)).cpu()
            for given in (codes, *(() if dense else (codes.transpose(1, 2).contiguous().transpose(1, 2),))):
                got = ours(given.to(device)).cpu()
                assert torch.equal(got.isnan(), want.isnan())
                assert torch.equal(got.nan_to_num(), want.nan_to_num())
        close(operands.core(cuda, one=bits < 8, apart=True)(x.to(device)).cpu().sum(0)[1], got[1].double())


def check_cores_by_triton(device: str) -> None:
    check_cores(device)
    without_thin(check_cores, device, True)


def models() -> Iterator[tuple[str, Any, Tensor]]:
    """Deployed models; those of a few blocks."""
    mambair = {
        "embed_dim": 20,
        "depths": (1,),
        "d_state": 5,
        "mlp_ratio": 1.2,
        "upsampler": "pixelshuffledirect",
    }
    builds: Any = (
        ("mambair", lambda: zoo.MambaIR(**mambair), (1, 3, 8, 12)),
        ("vmamba", lambda: zoo.vmamba_nano(num_classes=5), (1, 3, 32, 32)),
        ("vim", lambda: zoo.vim_nano(num_classes=5), (1, 3, 32, 32)),
    )
    for name, build, shape in builds:
        torch.manual_seed(1)
        model, x = build().eval(), torch.rand(shape)
        bits = 7 if name == "mambair" else 8  # codes of 7 bits go from kernel to kernel
        prepared = ssmquant.prepare(model, QConfig.recommended(bits, bits), example_inputs=(x,))
        ssmquant.calibrate(prepared, [x], progress=False)
        yield name, ssmquant.convert(prepared), x


def check_models(device: str) -> None:
    for name, model, x in models():
        model.to(device)
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                torch.backends.cudnn, "allow_tf32", False
            )  # or both round first layers in their own ways
            got = model(x.to(device))
            with use_backend("chunked", op="fuse"):
                want = model(x.to(device))
        kinds = set(runtime.runtime_of(model).records[0].kernels(model).values())
        assert kinds >= {"scan on codes", "products of codes"}, name
        close(got.cpu(), want.double().cpu(), 2e-2)  # codes at ties


def interpret(*checks: str) -> None:
    make_interpreter_work()
    poison(setattr)
    nvrtc.load = lambda source, _: emulated(source)  # type: ignore[assignment]
    for check in checks:
        globals()[check]("cpu")


def interpret_models() -> None:
    cuda.unavailable = lambda _: None  # type: ignore[assignment]
    for module in (runtime, deployed, deployed_scans, deployed_values):
        module.engine_of = lambda _: cuda  # type: ignore[attr-defined]
    interpret("check_models")


@needs_triton
@pytest.mark.parametrize(
    "check",
    [
        "check_convolutions",
        "check_attention",
        "check_norms",
        "check_called_norms",
        "check_cores_by_triton",
        "check_codes_by_triton",
    ],
)
def test_interpreted(check: str) -> None:
    in_process("test_deployed_cuda", f"interpret({check!r})", TRITON_INTERPRET="1")


@pytest.mark.slow
@needs_triton
def test_interpreted_projections() -> None:
    in_process("test_deployed_cuda", "interpret('check_projections')", TRITON_INTERPRET="1")


@pytest.mark.slow
@needs_triton
def test_interpreted_models() -> None:
    in_process("test_deployed_cuda", "interpret_models()", TRITON_INTERPRET="1")


def compile_for_h100() -> None:
    """Every kernel for the shapes of a call; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ssmquant.ops.deployed import triton_kernels

    kinds = {torch.float32: "*fp32", torch.int8: "*i8", torch.uint8: "*u8", torch.int32: "*i32"}
    built: set[str] = set()

    class Compiled:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(triton_kernels, name)

        def __call__(self, _: Any, tensors: Any, numbers: Any, constants: Any, warps: int) -> None:
            names = [p.name for p in self.kernel.params]
            values: dict[str, Any] = dict(zip(names, (*tensors, *numbers, *constants, 1), strict=True))
            fixed = {n: v for n, v in values.items() if n.isupper() or (isinstance(v, int) and v == 1)}
            signature = {}
            for n, v in values.items():
                number = "fp32" if isinstance(v, float) else "i32"
                signature[n] = (
                    "constexpr" if n in fixed else kinds[v.dtype] if isinstance(v, Tensor) else number
                )
            target, options = GPUTarget("cuda", 90, 32), {"num_warps": warps, "launch_pdl": True}
            made = triton.compile(ASTSource(self.kernel, signature, fixed), target=target, options=options)
            assert made.asm["cubin"]
            assert "griddepcontrol.wait" in made.asm["ptx"]
            built.add(self.name)

    cuda._kernel = Compiled  # type: ignore[assignment]
    cuda_thin.takes = lambda *_: False  # type: ignore[assignment]
    nvrtc.load = lambda source, _: emulated(source)  # type: ignore[assignment]
    grid, ones = make_grid(2, 1), torch.ones
    x = torch.randn(1, 64, 72)
    packed = cuda.pack(*Operands.weight((60, 72), 2, 1.0))
    norm = Norm(ones(72), ones(72), 1e-5)
    cuda.project(x, grid, packed, None, norm=norm, z=x, residual=(x[..., :60].contiguous(), ones(60)))
    codes = torch.zeros(1, 64, 72, dtype=torch.int8)
    cuda.project(x, grid, packed, more=(x.clone(),), codes=(grid, 30, ones(30)))
    cuda.project(codes, grid, packed, codes=(grid, 60, None))
    wide = torch.zeros(1, 64, 300, dtype=torch.int8)
    cuda.project(wide, grid, cuda.pack(*Operands.weight((60, 300), 2, 1.0)))
    cuda.project(
        torch.randn(1, 64, 600), make_grid(8, 1), cuda.pack(*Operands.weight((60, 600), 8, 1.0)), act="gelu"
    )
    cuda.convolve(
        x.view(1, 8, 8, 72),
        grid,
        cuda.pack(*Operands.weight((9, 60, 72), 2, 1.0)),
        None,
        *[(3, 3), (1, 1)] * 2,
    )
    cuda.blend(x, None, x, ones(1, 72))
    cuda.excite(x, ones(5, 72), ones(5), ones(72, 5), ones(72))
    cuda.normalize(x, norm)
    cuda.normalize(torch.randn(2, 60, 64).transpose(1, 2), Norm(ones(60), None, 1e-5, rms=True))
    cuda.normalize(torch.randn(1, 1000, 64).transpose(1, 2), Norm(None, None, 1e-5))
    Operands(1, 64, 72, 10, 4).core(cuda).encode(x)
    assert built == set(triton_kernels.__all__)


@pytest.mark.slow
@needs_triton
def test_triton_compiles_for_an_h100() -> None:
    in_process("test_deployed_cuda", "compile_for_h100()", TRITON_INTERPRET="0")


@pytest.mark.slow
@pytest.mark.skipif(nvrtc.describe() is None, reason="needs NVRTC or nvcc")
def test_cuda_compiles_for_an_h100() -> None:
    for case in (
        Case(choose(1, 4096, 72, 10, 2, 132), 10, 4, True, 16, 2, True),
        Case(choose(64, 3136, 96, 1, 2, 132), 1, 6, True, 0, 1, True),
        Case(choose(64, 197, 383, 16, 1, 132), 16, 48, False, 0, 0, False),
    ):
        assert nvrtc.compile_source(case.source(), 90)
    for channels, dilation, coded, codes, read in (
        (60, 2, 1, 1, 4),
        (30, 1, 1, 1, 2),
        (72, 1, 0, 0, 4),
        (33, 1, 1, 0, 1),
    ):
        for size in (16, 64, 320):
            grid, one = make_grid(4, 1), torch.zeros(1)
            wide = torch.zeros(
                1, size, size, channels + 1 - read % 2, dtype=torch.int8 if coded else torch.float32
            )
            d = Depthwise(
                wide[..., :channels], grid, torch.zeros(9, channels), torch.zeros(channels), (3, 3), (dilation,) * 2,
                "gelu", *((grid, torch.ones(channels), grid) if codes else (None, None, None)),
            )  # fmt: skip
            launch = cuda_depthwise.launch_of(d, one[None], one[None] if codes else None, not codes)
            source = nvrtc.specialised("deployed_cuda/depthwise", *launch.definitions.items())
            assert nvrtc.compile_source(source, 90)


def test_what_there_is_no_kernel_for() -> None:
    assert cuda.unavailable(torch.device("cpu")) is not None
    huge = torch.empty(1, device="meta").as_strided((1, 2**20, 2**12), (2**32, 2**12, 1))
    with pytest.raises(InputError, match="use tiles"):
        cuda.blend(huge, None, huge, torch.empty(1, 2**12, device="meta"))
    small = torch.empty(2, 49, 60)
    assert cuda.normalizes(small)
    for x in (huge[..., :1000], small[:0], small.half(), torch.empty(1, 2, cuda.MOST_COLUMNS + 1)):
        assert not cuda.normalizes(x)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "check",
    [
        check_projections,
        check_thin,
        check_codes_by_triton,
        check_cores_by_triton,
        check_convolutions,
        check_attention,
        check_norms,
        check_called_norms,
        check_models,
    ],
)
def test_on_a_gpu(check: Any) -> None:
    check("cuda")


@pytest.mark.gpu
def test_depthwise_on_a_gpu() -> None:
    for sizes in ((2, 19, 37, 72), (1, 1, 300, 33)):
        check_depthwise("cuda", sizes, (3, 3), (1, 1), "silu")
