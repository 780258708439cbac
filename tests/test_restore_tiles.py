"""Restoring in tiles: blending, seams, memory, and ranges of the whole picture."""

from __future__ import annotations

import io
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ssmquant
from ssmquant import QConfig
from ssmquant.errors import ConfigError, SsmquantError
from ssmquant.graph.runtime import runtime_of
from ssmquant.modules import ActivationQuantizer, FrozenRange
from ssmquant.quantizers import DLS
from ssmquant.quantizers.dls import dls_range, dls_statistics
from ssmquant.restore import open_image, restore_image, restore_tensor, tiling, to_tensor
from ssmquant.restore.ranges import _Pool, has_dynamic_ranges, with_picture_ranges
from tests import small

PHOTO = Path(__file__).parent.parent / "examples" / "photos" / "coffee.png"


class Nearest(nn.Module):
    """Enlarges by repetition, and remembers what it was shown."""

    def __init__(self, scale: int = 2) -> None:
        super().__init__()
        self.scale = scale
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape[-2:]))
        return x.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)


class Level(Nearest):
    """Every pixel is the mean of the tile: what remains are the blending weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean((-2, -1), keepdim=True).expand_as(x))


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return (
        Image.fromarray(values if bands > 1 else values[..., 0], mode=mode)
        if mode == "CMYK"
        else (Image.fromarray(values if bands > 1 else values[..., 0]))
    )


# ---- blending --------------------------------------------------------------------------------------------------------


def weights(start: int, length: int, size: int, overlap: int) -> Tensor:
    """The rule, pixel by pixel: nothing in the outer quarter of the overlap at an inner edge, then linear."""
    margin, out = overlap // 4, torch.ones(length)
    for i in range(length):
        for inner, depth in ((start > 0, i), (start + length < size, length - 1 - i)):
            if inner and overlap:
                rise = (depth - margin + 0.5) / max(1, overlap - 2 * margin)
                out[i] = min(float(out[i]), max(0.0, min(1.0, rise)))
    return out


def in_one_piece(model: nn.Module, x: Tensor, scale: int, tile: int, overlap: int) -> Tensor:
    """Sums of weighted tiles and of weights for the whole picture, divided at the end."""
    *_, height, width = x.shape
    total = torch.zeros(*x.shape[:2], height * scale, width * scale)
    weight = torch.zeros(height * scale, width * scale)

    def starts(size: int) -> list[int]:
        return [*range(0, size - tile, tile - overlap), size - tile] if size > tile else [0]

    for top in starts(height):
        for left in starts(width):
            y = model(x[..., top : top + tile, left : left + tile])
            rows, columns = y.shape[-2:]
            w = weights(top * scale, rows, height * scale, overlap * scale)[:, None] * weights(
                left * scale, columns, width * scale, overlap * scale
            )
            at = (..., slice(top * scale, top * scale + rows), slice(left * scale, left * scale + columns))
            total[at] += w * y
            weight[at] += w
    return total / weight


@pytest.mark.parametrize(
    ("height", "width", "tile", "overlap", "scale"),
    [
        (70, 53, 32, 16, 2),
        (33, 32, 32, 15, 3),
        (51, 16, 16, 8, 1),  # three rows of tiles meet in some pixels
        (20, 90, 32, 0, 2),
        (67, 67, 30, 1, 2),
        (1, 45, 16, 5, 2),
    ],
)
def test_bands_equal_the_picture_in_one_piece(
    height: int, width: int, tile: int, overlap: int, scale: int
) -> None:
    x = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    y = restore_tensor(Level(scale), x, scale, tile=tile, overlap=overlap)
    torch.testing.assert_close(y, in_one_piece(Level(scale), x, scale, tile, overlap), atol=1e-6, rtol=0)
    y = restore_tensor(Nearest(scale), x, scale, tile=tile, overlap=overlap)
    torch.testing.assert_close(y, Nearest(scale)(x), atol=1e-6, rtol=0)


def test_tiles_that_differ_go_over_into_each_other() -> None:
    """Steps between neighbours are the difference of two tiles, spread over half the overlap."""
    x = torch.linspace(0, 1, 160).expand(1, 3, 40, 160)
    y = restore_tensor(Level(), x, 2, tile=64, overlap=32)
    levels = [float(x[0, 0, 0, left : left + 64].mean()) for left in (0, 32, 64, 96)]
    assert y.min().item() == pytest.approx(levels[0], abs=1e-6)
    assert y.max().item() == pytest.approx(levels[-1], abs=1e-6)
    steps = y[0, 0, 0].diff()
    assert steps.max().item() == pytest.approx((levels[1] - levels[0]) / 32, rel=1e-3)
    assert steps.min().item() > -1e-6
    assert not y.diff(dim=-2).any()


def test_no_seams_of_a_static_model() -> None:
    """Where tiles meet, the difference from the whole picture jumps no more than it does anywhere."""
    torch.manual_seed(0)
    x = to_tensor(open_image(PHOTO).crop((40, 60, 176, 196)))
    config = QConfig.recommended(8, 8)
    prepared = small.prepared_and_calibrated(
        small.tiny_mambair().eval(), config, x[..., :32, :32].contiguous()
    )
    model = ssmquant.convert(prepared)
    assert not has_dynamic_ranges(model)
    whole = restore_tensor(model, x, 2)

    def jumps(overlap: int) -> tuple[float, float]:
        """The largest jump between two rows or columns, in medians; and the largest difference."""
        off = (restore_tensor(model, x, 2, tile=56, overlap=overlap) - whole)[0]
        lines = torch.cat((off.diff(dim=-1).abs().mean((0, 1)), off.diff(dim=-2).abs().mean((0, 2))))
        return float(lines.max() / lines.median()), float(off.abs().max())

    ratio, worst = jumps(16)
    assert ratio < 3
    assert worst < 8 / 255
    assert jumps(0)[0] > 10  # the measure sees seams where nothing is blended


# ---- which tiles -----------------------------------------------------------------------------------------------------


def test_big_pictures_are_cut_by_themselves() -> None:
    def seen(width: int, height: int, **options: Any) -> list[tuple[int, ...]]:
        model = Nearest(1)
        restore_image(model, Image.new("L", (width, height)), **options)
        return model.shapes

    assert seen(512, 512) == [(512, 512)]
    assert seen(1024, 256) == [(256, 1024)]
    assert seen(257, 1024) == [(256, 256)] * 10  # 2 columns of 5
    assert seen(1024, 520, overlap=200) == [(400, 400)] * 10
    assert seen(1024, 520, tile=None) == [(520, 1024)]
    assert seen(100, 40, tile=64) == [(40, 64)] * 3
    model = Nearest(1)
    restore_tensor(model, torch.zeros(1, 3, 520, 520), tile="auto")
    assert set(model.shapes) == {(256, 256)}
    model.shapes.clear()
    restore_tensor(model, torch.zeros(1, 3, 520, 520))
    assert model.shapes == [(520, 520)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 8, "overlap": 2}, "at least 16 pixels"),
        ({"tile": 0}, "at least 16 pixels"),
        ({"tile": -256}, "at least 16 pixels"),
        ({"tile": 40, "overlap": 21}, "twice the overlap"),
        ({"tile": 40, "overlap": -1}, "twice the overlap"),
        ({"tile": "auto", "overlap": -1}, "twice the overlap"),
        ({"tile": "big"}, "tile is a number of pixels"),
        ({"tile": 64.0}, "tile is a number of pixels"),
        ({"statistics": "row"}, "'picture' or the 'tile'"),
        ({"scale": 0}, "a scale is 1 or more"),
        ({"scale": 3}, "scale=3 does not fit the model"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    model = Nearest().train()
    with pytest.raises(ConfigError, match=message):
        restore_image(model, noise(50, 70), **{"scale": 2, **options})
    with pytest.raises(ConfigError, match=message):
        restore_tensor(model, torch.rand(1, 3, 50, 70), **{"scale": 2, **options})
    assert model.training


def test_progress_counts_every_call() -> None:
    seen: list[tuple[int, int]] = []
    restore_image(Nearest(), noise(50, 40), 2, 32, 8, progress=lambda *n: seen.append(n))
    assert seen == [(i, 4) for i in range(5)]
    seen.clear()
    restore_tensor(Nearest(), torch.rand(2, 3, 16, 16), 2, progress=lambda *n: seen.append(n))
    assert seen == [(0, 1), (1, 1)]


def test_values_that_are_not_finite_stop_at_their_tile() -> None:
    class Breaks(Nearest):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / (x.amax() < 0.9)

    x = torch.zeros(1, 3, 64, 64)
    x[..., 40, 20] = 1  # in tiles of rows from 24 or 40, and columns from 0
    model = Breaks().train()
    with pytest.raises(SsmquantError, match="output holds values that are not finite"):
        restore_tensor(model, x, 2, tile=32, overlap=8)
    assert len(model.shapes) == 4  # three of the first row, one of the second
    assert model.training
    with pytest.raises(SsmquantError, match="input holds values that are not finite"):
        restore_tensor(Nearest(), torch.where(x > 0, torch.inf, x), 2, tile=32, overlap=8)


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 70), (70, 1), (17, 33), (64, 48), (47, 16)])
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_every_size_and_mode_in_tiles(size: tuple[int, int], mode: str) -> None:
    image = noise(*size, mode)
    result = restore_image(Nearest(3), image, 3, tile=16, overlap=5)
    whole = restore_image(Nearest(3), image, 3, tile=None)
    assert (result.size, result.mode) == ((3 * size[0], 3 * size[1]), mode)
    assert np.array_equal(np.asarray(result), np.asarray(whole))
    colours = {"LA": "L", "RGBA": "RGB"}.get(mode, mode)
    wanted = image.convert(colours).resize(result.size, Image.Resampling.NEAREST)
    assert np.array_equal(np.asarray(result.convert(colours)), np.asarray(wanted))


def test_16_bit_grey_in_tiles() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (150, 37)).astype(np.uint16)
    result = restore_image(Nearest(), Image.fromarray(values), 2, tile=16, overlap=6)
    back = np.asarray(result)
    assert (result.mode, back.dtype) == ("I;16", np.uint16)
    off = np.abs(back.astype(int) - values.repeat(2, 0).repeat(2, 1))
    assert off.max() <= 1  # the weights of grey, and those of tiles, sum to 1 in float32


@pytest.mark.parametrize(
    ("image", "kind", "options"),
    [
        (noise(40, 50).quantize(16), "PNG", {}),
        (noise(40, 50).quantize(16), "PNG", {"transparency": 0}),
        (noise(40, 50, "L").quantize(4), "GIF", {}),
        (noise(40, 50).convert("1"), "TIFF", {}),
        (noise(40, 50).convert("CMYK"), "JPEG", {}),
        (noise(40, 50).convert("CMYK"), "TIFF", {}),
        (noise(40, 50).convert("YCbCr"), "TIFF", {}),
        (noise(40, 50).convert("LAB"), "TIFF", {}),
        (noise(40, 50).convert("PA"), "TIFF", {}),
    ],
    ids=["palette", "transparent palette", "gif", "bilevel", "cmyk jpeg", "cmyk", "ycbcr", "lab", "pa"],
)
def test_modes_of_files(image: Image.Image, kind: str, options: dict[str, Any]) -> None:
    if image.mode == "PA":
        opened = image
    else:
        stream = io.BytesIO()
        image.save(stream, format=kind, **options)
        opened = open_image(stream.getvalue())
    result = restore_image(Nearest(), opened, 2, tile=16, overlap=4)
    whole = restore_image(Nearest(), opened, 2)
    assert result.size == (80, 100)
    assert result.mode in ("L", "LA", "RGB", "RGBA")
    assert np.array_equal(np.asarray(result), np.asarray(whole))


# ---- memory ----------------------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Bytes of floating-point tensors that are alive at a time, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.is_floating_point():
                self.alive[id(t)] = t
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.alive.values()}
        self.peak = max(self.peak, sum(storages.values()))
        return out


def peak(run: Callable[[], Any]) -> int:
    with Live() as live:
        run()
    return live.peak


@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_memory_of_pictures_does_not_grow_with_their_height(mode: str) -> None:
    def of(height: int) -> int:
        image = Image.new(mode, (96, height))
        return peak(lambda: restore_image(Nearest(), image, 2, tile=96, overlap=16))

    low, high = of(200), of(800)
    assert high <= low * 1.01 + 8192  # weights of rows: some floats a row
    band = 3 * 192 * 192 * 4
    assert band < high < 5 * band
    whole = peak(lambda: restore_image(Nearest(), Image.new(mode, (96, 800)), 2))
    assert whole > 4 * high


def test_memory_of_tensors_is_their_result_and_a_band() -> None:
    def of(height: int) -> int:
        x = torch.zeros(1, 3, height, 96)
        return peak(lambda: restore_tensor(Nearest(), x, 2, tile=32, overlap=8)) - 3 * 4 * height * 96 * 5

    assert of(800) <= of(200) + 3 * 96 * 4 * 64 + 4096


# ---- ranges of the picture -------------------------------------------------------------------------------------------


def test_pooled_statistics_are_those_of_all_values() -> None:
    x = (torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3 + 50).sort().values
    for values in (x, x.flip(0)):
        pool = _Pool()
        for part in values.split([1, 400, 7, 592]):
            pool.add(part.numel(), *dls_statistics(part, None).tolist())
        found = pool.statistics()
        assert found is not None
        torch.testing.assert_close(found, dls_statistics(x, None), rtol=1e-5, atol=0)
    pool.add(3, float("nan"), 1.0, 0.0, 1.0)
    assert pool.statistics() is None
    assert _Pool().statistics() is None


def uneven(height: int = 96, width: int = 64, batch: int = 1) -> Tensor:
    """Pictures that are dark at the top, bright at the bottom: tiles differ in their ranges."""
    x = small.images(batch, 3, height, width)
    return x * torch.linspace(0.05, 1, height)[:, None] * torch.linspace(1, 0.5, batch).view(-1, 1, 1, 1)


def pointwise() -> Any:
    """A deployed model of 1x1 convolutions, with one dynamic quantizer: tiles matter through its range alone."""
    torch.manual_seed(0)
    model = small.Chain(nn.Conv2d(4, 4, 1)).eval()
    config = QConfig(w_bits=8, a_bits=4, activation="dls")
    return ssmquant.convert(small.prepared_and_calibrated(model, config, uneven()))


def dynamic(model: nn.Module) -> list[ActivationQuantizer]:
    return [m for m in model.modules() if isinstance(m, ActivationQuantizer) and isinstance(m.quantizer, DLS)]


def capture(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that tiles are run with, after the pass for statistics."""
    made: list[nn.Module] = []

    def with_ranges(model: nn.Module, visit: Callable[[nn.Module], None]) -> nn.Module:
        made.append(with_picture_ranges(model, visit))
        return made[-1]

    monkeypatch.setattr(tiling, "with_picture_ranges", with_ranges)
    return made


def test_all_tiles_have_the_ranges_of_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = pointwise(), uneven()
    (wrapper,) = dynamic(model)
    made = capture(monkeypatch)
    called: list[nn.Module] = []
    call = tiling._call
    monkeypatch.setattr(tiling, "_call", lambda m, *args: called.append(m) or call(m, *args))
    picture = restore_tensor(model, x, 1, tile=32, overlap=8)
    (frozen,) = made
    assert called == [frozen] * (6 + 12)  # parts, then tiles
    quantizer = next(m.quantizer for m in frozen.modules() if isinstance(m, ActivationQuantizer))
    assert isinstance(quantizer, FrozenRange)
    assert not any(m._forward_pre_hooks for m in frozen.modules() if isinstance(m, ActivationQuantizer))

    statistics = dls_statistics(model.first(x), None)
    seen = next(m.seen for m in frozen.modules() if isinstance(m, ActivationQuantizer))
    torch.testing.assert_close(seen, statistics, rtol=1e-5, atol=1e-6)
    q: Any = wrapper.quantizer
    alpha, beta = dls_range(statistics, q.w, q.v, q.bits, q.eps)
    torch.testing.assert_close((quantizer.alpha, quantizer.beta), (alpha, beta), rtol=1e-5, atol=1e-6)

    torch.testing.assert_close(picture, frozen(x), rtol=0, atol=1e-5)
    # But for the ends, which a frozen range has at levels, that is what the model makes of the whole picture.
    whole = restore_tensor(model, x, 1)
    tiles = restore_tensor(model, x, 1, tile=32, overlap=8, statistics="tile")
    assert (picture - whole).abs().mean() < 0.1 * (tiles - whole).abs().mean()
    assert len(made) == 1


def test_every_sample_has_ranges_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = pointwise(), uneven(batch=2)
    made = capture(monkeypatch)
    seen: list[tuple[int, int]] = []
    both = restore_tensor(model, x, 1, tile=32, overlap=8, progress=lambda *n: seen.append(n))
    assert len(made) == 2
    assert seen == [(i, 36) for i in range(37)]
    single = [restore_tensor(model, s, 1, tile=32, overlap=8) for s in x.split(1)]
    torch.testing.assert_close(both, torch.cat(single), rtol=0, atol=0)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_the_model_stays_as_it_was(wrapped: bool) -> None:
    torch.manual_seed(0)
    x = uneven(48, 40)
    inner = ssmquant.convert(
        small.prepared_and_calibrated(small.tiny_mambair().eval(), QConfig.qmambair(4), x[..., :24, :24])
    )
    model = nn.Sequential(inner, nn.Identity()) if wrapped else inner
    runtime = runtime_of(inner)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    whole = restore_tensor(model, x, 2)
    records = [(r, r.graph, r.run, dict(r.fused), r.deployed) for r in runtime.records]
    modules = list(model.modules())

    def unchanged() -> None:
        assert list(model.modules()) == modules
        assert all(isinstance(m.quantizer, DLS) for m in dynamic(model))
        assert not any(m._forward_pre_hooks for m in dynamic(model))
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        now = [(r, r.graph, r.run, dict(r.fused), r.deployed) for r in runtime.records]
        assert all(a == b for a, b in zip(records, now[: len(records)], strict=True))
        assert torch.equal(restore_tensor(model, x, 2), whole)

    assert has_dynamic_ranges(model)
    seen: list[tuple[int, int]] = []
    picture = restore_tensor(model, x, 2, tile=24, overlap=8, progress=lambda *n: seen.append(n))
    assert seen == [(i, 4 + 6) for i in range(11)]  # parts of 24 x 20, tiles of 24 x 24
    unchanged()
    assert not torch.equal(picture, restore_tensor(model, x, 2, tile=24, overlap=8, statistics="tile"))

    class Stop(Exception):
        pass

    for at in (2, 7):  # in the pass for statistics, and in the other

        def stop(done: int, total: int, at: int = at) -> None:
            if done == at:
                raise Stop

        with pytest.raises(Stop):
            restore_tensor(model, x, 2, tile=24, overlap=8, progress=stop)
        unchanged()


def test_graphs_of_the_copy_are_its_own() -> None:
    torch.manual_seed(0)
    x = uneven(48, 40)
    prepared = small.prepared_and_calibrated(
        small.tiny_mambair().eval(), QConfig.qmambair(4), x[..., :24, :24]
    )
    model, other = ssmquant.cuda_graph(ssmquant.convert(prepared), max_graphs=3), ssmquant.convert(prepared)

    def visit(new: nn.Module) -> None:
        assert runtime_of(new).graphs is None  # a replay would call no hook
        new(x)

    frozen = runtime_of(with_picture_ranges(model, visit)).graphs
    assert frozen is not None
    assert frozen.most == 3
    restore_tensor(model, x, 2, tile=24, overlap=8)
    assert not any(r.fused for r in runtime_of(model).records)  # for dynamic ranges they are others
    assert torch.equal(restore_tensor(model, x, 2), restore_tensor(other, x, 2))


def test_what_has_several_ranges_stays_dynamic() -> None:
    model = pointwise()
    assert not has_dynamic_ranges(with_picture_ranges(model, lambda new: new(uneven())))
    assert has_dynamic_ranges(with_picture_ranges(model, lambda new: new(uneven(batch=2))))
    assert has_dynamic_ranges(with_picture_ranges(model, lambda new: new(uneven() * torch.inf)))
    assert has_dynamic_ranges(with_picture_ranges(model, lambda new: None))


def test_tiles_agree_where_they_share_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ranges of the picture the tiles of a local model are equal in their overlap, with ranges of tiles not."""
    model, x = pointwise(), uneven()
    parts: list[Tensor] = []
    call = tiling._call

    def keep(m: nn.Module, part: Tensor, scale: int) -> Tensor:
        parts.append(call(m, part, scale))
        return parts[-1]

    monkeypatch.setattr(tiling, "_call", keep)

    def apart(statistics: Any) -> float:
        parts.clear()
        restore_tensor(model, x, 1, tile=48, overlap=16, statistics=statistics)
        tiles = parts[-6:]  # rows from 0, 32, 48; columns from 0, 16
        return float((tiles[0][..., 32:48, :] - tiles[2][..., :16, :]).abs().max())

    assert apart("picture") < 1e-5
    assert apart("tile") > 0.01


def test_a_model_without_graphs_is_traced_at_the_size_of_its_example() -> None:
    """Models from files have none; at the size of a tile it takes longer, and more memory than the tile."""
    model = pointwise()
    runtime_of(model).records = []
    restore_tensor(model, uneven(40, 56), 1)
    records = runtime_of(model).records
    assert [r.verified[0] for r in records] == [((1, 3, 96, 64),)]


def test_prepared_models_and_the_published_form() -> None:
    torch.manual_seed(0)
    x = uneven()
    model = small.Chain(nn.Conv2d(4, 4, 1)).eval()
    prepared = small.prepared_and_calibrated(model, QConfig(w_bits=8, a_bits=4, activation="dls"), x)
    assert has_dynamic_ranges(prepared)
    made = restore_tensor(prepared, x, 1, tile=32, overlap=8)
    deployed = restore_tensor(ssmquant.convert(prepared), x, 1, tile=32, overlap=8)
    torch.testing.assert_close(made, deployed, rtol=0, atol=1e-4)
    published = small.prepared_and_calibrated(
        model, QConfig(w_bits=8, a_bits=4, activation="dls", official=True), x
    )
    assert not has_dynamic_ranges(published)
    assert not has_dynamic_ranges(ssmquant.convert(prepared, dls="frozen"))
