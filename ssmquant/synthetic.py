"""Images to calibrate with where there are none: dead leaves, or images that fit a model's BatchNorm statistics.

Dead leaves (Lee, Mumford, Huang, "Occlusion models for natural images", IJCV 2001): discs of random places, sizes and
colours that hide one another. With radii of a density ``r**-3`` they have what natural images have: smooth regions,
edges, a spectrum near 1 / frequency, the same statistics at all scales. Each leaf has a texture of that spectrum, and
colours vary mostly in brightness, as in natural images (Ruderman, Cronin, Chiao, JOSA A 1998).

Matching BatchNorm statistics is ZeroQ's distillation (Cai et al., arXiv 2001.00281, equation 3; DeepInversion, arXiv
1912.08795): images are moved until each BatchNorm layer sees the mean and the deviation that it remembers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ssmquant.adapter import find_adapter
from ssmquant.errors import ConfigError, InputError
from ssmquant.graph.prepared import evaluating
from ssmquant.graph.runtime import is_prepared, runtime_of
from ssmquant.graph.trace import describe_call
from ssmquant.progress import limited

__all__ = ["SYNTHETIC", "dead_leaves", "synthetic_batches"]

Source = Literal["auto", "noise", "batchnorm"]

SYNTHETIC = 16
"""Batches, by default."""
_LEAVES = 200
_TINT = 0.2
_TEXTURE = 0.15
_STEPS = 200
_RATE = 0.05
_Norm = nn.modules.batchnorm._BatchNorm


def synthetic_batches(
    model: nn.Module,
    count: int = SYNTHETIC,
    batch_size: int | None = None,
    *,
    source: Source = "auto",
    value_range: tuple[float, float] = (0.0, 1.0),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    steps: int = _STEPS,
    seed: int = 0,
    progress: bool | None = None,
) -> list[Tensor]:
    """Images for :func:`calibrate` where there are no real ones, which are better: of the size of the model's example.

    The same for the same arguments on one machine; the global random state is left alone.

    Args:
        model: A prepared model, or a float one whose example input an adapter knows.
        count: Number of batches.
        batch_size: Images in a batch; as in the example by default. ``"batchnorm"`` is better with 8 or more.
        source: ``"noise"`` (dead leaves), ``"batchnorm"`` (those, fitted to the statistics of the model's BatchNorm
            layers), or ``"auto"``: ``"batchnorm"`` where the model has BatchNorm layers with running statistics.
        value_range: Least and largest value of a pixel before it is normalised.
        mean, std: By channel, for models whose inputs are normalised: images are ``(pixel - mean) / std``.
        steps: Of the optimiser (Adam), for ``"batchnorm"``.
        seed: Other images for each.
        progress: Show a progress bar for ``"batchnorm"``; by default where stderr is a terminal and rich is installed.

    Returns:
        ``count`` tensors (batch_size, channels, height, width), of the dtype and on the device of the example.

    Raises:
        ConfigError: an argument is out of range, no example is known, or ``"batchnorm"`` of a model that has none.
        InputError: the model does not take one batch of images.
    """
    if source not in ("auto", "noise", "batchnorm"):
        raise ConfigError(f"source={source!r}: expected 'auto', 'noise' or 'batchnorm'")
    for name, value in (("count", count), ("batch_size", batch_size), ("steps", steps)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"synthetic_batches: {name}={value!r}: expected 1 or more")
    example = _image_of(model)
    size, channels = batch_size or example.shape[0], example.shape[1]
    low, high = value_range
    if not -math.inf < low < high < math.inf:
        raise ConfigError(f"value_range={value_range!r}: expected two numbers, the smaller one first")
    shift, scale = _by_channel("mean", mean, 0.0, channels), _by_channel("std", std, 1.0, channels)
    if not bool((scale > 0).all()):
        raise ConfigError(f"std={std!r}: expected positive numbers")
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        pixels = dead_leaves((size, *example.shape[1:]), generator) * (high - low) + low
        batches.append(((pixels - shift) / scale).to(example.device, example.dtype))
    if source == "noise" or not _reaches_norms(model, batches[0][:1]):
        if source == "batchnorm":
            raise ConfigError("source='batchnorm': the model runs no BatchNorm layer with running statistics")
        return batches
    bounds = tuple(((v - shift) / scale).to(example.device, torch.float32) for v in (low, high))
    return [_fitted(model, x, bounds, steps) for x in limited(batches, None, progress, "making images")]


def _image_of(model: nn.Module) -> Tensor:
    """The example's image: (B, C, H, W), float."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"synthetic_batches: expected a model, got {type(model).__name__}")
    if is_prepared(model):
        bound = runtime_of(model).example
    else:
        adapter = find_adapter(model)
        if adapter is None or adapter.example is None:
            raise ConfigError(
                f"no adapter knows an example input for {type(model).__name__}: prepare it first, "
                "ssmquant.prepare(model, qconfig, example_inputs=(x,))"
            )
        bound = adapter.example(model)
    tensors = [t for t in pytree.tree_leaves(bound) if isinstance(t, Tensor)]
    image = tensors[0] if len(tensors) == 1 and bound[0] is tensors[0] else None
    if image is None or image.dim() != 4 or not image.is_floating_point() or not image.numel():
        given = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors)
        raise InputError(
            f"images can be made up for models that take one float tensor (B, C, H, W); {type(model).__name__} takes "
            f"{given}: pass batches of its own data"
        )
    return image


def _by_channel(name: str, values: Sequence[float] | None, default: float, channels: int) -> Tensor:
    out = torch.full((channels,), default) if values is None else torch.as_tensor(values, dtype=torch.float32)
    if out.shape != (channels,) or not bool(out.isfinite().all()):
        raise ConfigError(f"{name}={values!r}: expected {channels} numbers, one for each channel")
    return out[:, None, None]


# ---- dead leaves ---------------------------------------------------------------------------------------------------


def dead_leaves(shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """Images (B, C, H, W) of dead leaves with values in 0..1, float32 on the CPU."""
    b, c, h, w = shape

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator)

    def colour() -> Tensor:
        tint = torch.randn((b, c), generator=generator) * (_TINT if c > 1 else 0.0)
        return uniform(b, 1) + tint * uniform(b, 1)

    rows, columns = torch.arange(h)[:, None] + 0.5, torch.arange(w) + 0.5
    # Of the density r**-3 between the two; much smaller ones are no more than noise, larger ones a plain image.
    least, most = 1.0, max(2.0, max(h, w) / 2)
    image = colour()[:, :, None, None].expand(b, c, h, w).contiguous()
    contrast = torch.ones(b, 1, h, w)
    for _ in range(_LEAVES):
        radius = (uniform(b) * (most**-2 - least**-2) + least**-2) ** -0.5
        # Leaves that only reach in from outside are as likely as others.
        y, x = (uniform(b) * (n + 2 * radius) - radius for n in (h, w))
        away = ((rows - y[:, None, None]) ** 2 + (columns - x[:, None, None]) ** 2).sqrt()
        cover = (radius[:, None, None] - away + 0.5).clamp(0, 1)[:, None]  # edges are one pixel wide
        image += cover * (colour()[:, :, None, None] - image)
        contrast += cover * (2 * uniform(b)[:, None, None, None] - contrast)
    texture = _pink((b, 1, h, w), generator)
    return (image + _TEXTURE * contrast * texture).clamp(0, 1)


def _pink(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gaussian noise of an amplitude spectrum 1 / frequency, of deviation 1."""
    h, w = shape[-2:]
    white = torch.randn(shape, generator=generator)
    frequency = torch.hypot(torch.fft.fftfreq(h)[:, None], torch.fft.rfftfreq(w))
    gain = torch.where(frequency > 0, 1 / frequency.clamp(min=1e-6), 0.0)
    noise = torch.fft.irfft2(torch.fft.rfft2(white) * gain, s=(h, w))
    return noise / noise.std(dim=(-2, -1), keepdim=True, correction=0).clamp(min=1e-6)


# ---- BatchNorm statistics ------------------------------------------------------------------------------------------


def _remembers(module: nn.Module) -> bool:
    return isinstance(module, _Norm) and module.running_mean is not None and module.running_var is not None


class _Listener(fx.Interpreter):
    """Runs a traced float graph and shows what its BatchNorm layers get."""

    def __init__(self, model: nn.Module, graph: fx.Graph, see: Callable[[nn.Module, Tensor], None]) -> None:
        super().__init__(model, graph=graph)
        self.extra_traceback = False
        self.see = see

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if _remembers(module):
            self.see(module, args[0] if args else kwargs["input"])
        # Not through hooks: those of a prepared model refuse, as nothing but its graph may compute with the weights.
        return module.forward(*args, **kwargs)


def _run(model: nn.Module, x: Tensor, see: Callable[[nn.Module, Tensor], None]) -> None:
    """Runs the float model, in evaluation mode; a prepared one without its quantizers."""
    if is_prepared(model):
        runtime = runtime_of(model)
        call = describe_call((x, *runtime.example[1:]))
        _Listener(model, runtime.select(model, call).trace.graph, see).run(*call.tensors)
        return
    handles = [
        m.register_forward_pre_hook(lambda m, args: see(m, args[0])) for m in model.modules() if _remembers(m)
    ]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()


def _reaches_norms(model: nn.Module, x: Tensor) -> bool:
    if not any(_remembers(m) for m in model.modules()):
        return False
    seen: list[nn.Module] = []
    with evaluating(model), torch.no_grad():
        _run(model, x, lambda norm, _: seen.append(norm))
    return bool(seen)


def _fitted(model: nn.Module, x: Tensor, bounds: tuple[Tensor, ...], steps: int) -> Tensor:
    """Moves images, within their bounds, towards the statistics that the BatchNorm layers remember.

    The loss is the sum over layers of the mean over channels of ``((mean - m) / s)**2 + (deviation / s - 1)**2``, m and
    s what the layer remembers: ZeroQ's equation 3, with each layer and channel in units of its own.
    """
    losses: list[Tensor] = []

    def see(norm: Any, value: Tensor) -> None:
        flat = value.float().movedim(1, 0).flatten(1)
        spread = (norm.running_var + norm.eps).sqrt().float()
        away = (flat.mean(1) - norm.running_mean) / spread
        width = (flat.var(1, correction=0) + norm.eps).sqrt() / spread - 1
        losses.append((away.square() + width.square()).mean())

    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        image = x.detach().float().clone().requires_grad_(True)
        adam = torch.optim.Adam([image], lr=_RATE * float((bounds[1] - bounds[0]).mean()))
        for _ in range(steps):
            losses.clear()
            _run(model, image.to(x.dtype), see)
            loss = torch.stack(losses).sum()
            if not bool(loss.isfinite()):
                raise InputError("source='batchnorm': the model's values are NaN or inf; use source='noise'")
            (image.grad,) = torch.autograd.grad(loss, [image])
            adam.step()
            with torch.no_grad():
                image.copy_(image.clamp(*bounds))
    return image.detach().to(x.dtype)
