"""What every site of a model is: scheme, bytes, bit operations, kernel; and why the float ones are float."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from ssmquant.analysis.health import weight_rows
from ssmquant.graph.gains import foldable
from ssmquant.graph.plan import Point
from ssmquant.graph.runtime import Record, Runtime, runtime_of
from ssmquant.graph.sites import Site, ancestors, op_name
from ssmquant.modules import ActivationQuantizer, PackedTensor
from ssmquant.pack import packed_size
from ssmquant.quantizers import Quantizer
from ssmquant.workflow import ensure_traced

__all__ = ["Summary", "SummaryRow", "bit_operations", "operands_of", "site_widths", "stored_shape", "summary"]


@dataclass(frozen=True)
class SummaryRow:
    """One site. ``scheme`` is like ``"W2A2"``; ``bytes`` counts its stored operands, ``bitops`` one sample.

    ``dead_levels`` and ``zero_ratio`` are of a quantized weight, None elsewhere: levels that no element takes, and the
    share of elements at the level nearest to zero. See :func:`ssmquant.health`.
    """

    name: str
    kind: str
    scheme: str
    methods: str
    bytes: int
    bitops: int
    kernel: str
    note: str
    dead_levels: int | None = None
    zero_ratio: float | None = None
    float_bitops: int = 0
    """``bitops`` if nothing were quantized."""


@dataclass(frozen=True)
class Summary:
    """All rows and the totals. ``bytes``: everything the model stores (float remainder included); ``parameters``:
    values it stands for; ``bitops``: one sample of ``input_shapes``, operands kept in float counting 32 bits.
    ``transforms``: what ``calibrate`` did to the float model first, as kind, site and how (see ``QConfig.transforms``);
    ``not_transformed``: where it could not, and why. ``weights``: parameters that reach a matmul, convolution or scan;
    ``uncovered``: those of them that no site covers.
    """

    rows: tuple[SummaryRow, ...]
    bytes: int
    float_bytes: int
    parameters: int
    bitops: int
    input_shapes: tuple[tuple[int, ...], ...]
    floats: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    weights: int
    uncovered: tuple[tuple[str, str], ...]
    transforms: tuple[tuple[str, str, str], ...] = ()
    not_transformed: tuple[tuple[str, str, str], ...] = ()

    def __str__(self) -> str:
        width = max([len(r.name) for r in self.rows] or [4])
        columns = f"{'kind':<6}  {'scheme':<7}  {'quantizers':<11}  {'bytes':>9}  {'MBitOPs':>10}"
        head = f"{'site':<{width}}  {columns}  dead    zero  kernel"
        lines = [head, "-" * len(head)]
        for r in self.rows:
            dead = "-" if r.dead_levels is None else str(r.dead_levels)
            zero = "-" if r.zero_ratio is None else f"{100 * r.zero_ratio:.1f}%"
            lines.append(
                f"{r.name:<{width}}  {r.kind:<6}  {r.scheme:<7}  {r.methods:<11}  "
                f"{r.bytes:>9,}  {r.bitops / 1e6:>10,.1f}  {dead:>4}  {zero:>6}  "
                f"{r.kernel}" + (f"  ({r.note})" if r.note else "")
            )
        counts: dict[str, int] = {}
        for _, reason in self.floats:
            counts[reason] = counts.get(reason, 0) + 1
        kept = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
        lines.append("-" * len(head))
        lines.append(
            f"{self.parameters:,} parameters in {self.bytes:,} bytes ({self.float_bytes:,} of them float); "
            f"{self.bitops / 1e9:,.2f} GBitOPs for input {' '.join('x'.join(map(str, s)) for s in self.input_shapes)}"
        )
        lines.append(
            f"coverage: {self.weights - len(self.uncovered)} of {self.weights} parameters that reach a matmul, "
            "convolution or scan belong to a site"
        )
        lines.extend(f"NOT COVERED: {name} ({why})" for name, why in self.uncovered)
        if self.transforms or self.not_transformed:
            lines.append("transforms:")
            lines.extend(f"  {kind:<17}  {site}: {how}" for kind, site, how in self.transforms)
            lines.extend(f"  {kind:<17}  {site}: NOT, {why}" for kind, site, why in self.not_transformed)
        if kept:
            lines.append(f"float parameters outside sites: {kept}")
        lines.extend(f"note: {n}" for n in self.notes)
        return "\n".join(lines)


def _macs(site: Site) -> int:
    """Multiply-accumulates of a site for the traced sizes."""
    out = site.node.meta["val"]
    out = out[0] if isinstance(out, (tuple, list)) else out
    x = site.inputs[0].node.meta["val"]
    name = op_name(site.node)
    if name == "einsum":
        spec = str(site.node.args[0]).replace(" ", "").split("->")[0].split(",")
        shapes = [o.node.meta["val"].shape for o in (*site.inputs, *([site.weight] if site.weight else []))]
        order = sorted(
            zip(
                [str(o.at) for o in (*site.inputs, *([site.weight] if site.weight else []))],
                shapes,
                strict=True,
            )
        )
        sizes: dict[str, int] = {}
        for labels, (_, shape) in zip(spec, order, strict=False):
            sizes.update(zip(labels, shape, strict=False))
        return math.prod(sizes.values())
    if site.kind == "matmul":
        return int(out.numel() * x.shape[-1 if site.inputs[0].at == 0 else -2])
    return int(out.numel())  # times the fan-in, see bit_operations


def bit_operations(model: nn.Module, record: Record, site: Site, w_bits: float, a_bits: float) -> int:
    """Those of one sample of the traced sizes, with a weight and inputs (operands of a scan) of so many bits."""
    trace = record.trace
    samples = trace.shapes[0][0] if (0, 0) in trace.free else 1
    if site.kind == "scan":
        u, a = site.scan["u"].meta["val"], site.scan["A"].meta["val"]
        # Per (b, d, l, n): delta*A and delta*u*B on operands, C*h on one, and the state update in float.
        n = u.numel() * (a.shape[1] if a.dim() == 2 else site.scan["B"].meta["val"].shape[-1])
        return int(n * (2 * a_bits * a_bits + 32 * a_bits + 32 * 32) // samples)
    if site.kind == "matmul":
        return int(_macs(site) * w_bits * a_bits // samples)
    weight = _weight_shape(model, site)
    transposed = "transpose" in op_name(site.node) or "Transpose" in "".join(site.types)
    if transposed:
        macs = site.inputs[0].node.meta["val"].numel() * math.prod(weight[1:])
    else:
        macs = _output_numel(site) * math.prod(weight[1:])
    return int(int(macs) * w_bits * a_bits // samples)


def operands_of(record: Record) -> dict[str, dict[str, Point]]:
    """The quantized operands of every quantized site, by their names; its weight is ``"weight"``."""
    out: dict[str, dict[str, Point]] = {}
    for p in record.plan.points:
        for site, operand in p.uses:
            out.setdefault(site.name, {})[operand.name if p.what != "weight" else "weight"] = p
    return out


def site_widths(bits: Mapping[str, float | None]) -> tuple[float, float]:
    """Bits of a site's weight and of its inputs, 32 for float, from those of its operands by name."""
    inputs = [b or 32 for name, b in bits.items() if name != "weight"]
    return bits.get("weight") or 32, max(inputs, default=32)


def _output_numel(site: Site) -> int:
    return int(site.node.meta["val"].numel())


def _weight_shape(model: nn.Module, site: Site) -> tuple[int, ...]:
    if site.weight is not None:
        return tuple(site.weight.node.meta["val"].shape)
    runtime = runtime_of(model)
    if site.parameter in runtime.dropped:
        return runtime.dropped[site.parameter][0]
    return tuple(model.get_parameter(str(site.parameter)).shape)


def _point_bytes(point: Point, runtime: Runtime, absorbed: Collection[str]) -> int:
    """Bytes of a file: the codes of weights and static operands, their map and the state of others in float32."""
    if point.what == "activation":
        wrapper = runtime.activations[point.key]
        assert isinstance(wrapper, ActivationQuantizer)
        state = wrapper.quantizer.state_dict().values()  # flags stand in a file's table
        gain = wrapper.gain
        stays = gain is not None and point.key not in absorbed and not bool((gain == 1).all())
        exponents = gain.numel() if gain is not None and stays else 0
        return exponents + sum(4 * t.numel() for t in state if t.is_floating_point())
    holder = runtime.weights[point.key]
    if isinstance(holder, PackedTensor):
        codes = holder.codes.numel()
        left_out = {"codes", "scale"} if holder.alike else {"codes"}
        return codes + sum(4 * t.numel() for name, t in holder.named_buffers() if name not in left_out)
    assert isinstance(holder, Quantizer)
    assert point.scheme.bits is not None
    codes, scalars = holder.stored(stored_shape(point))
    return packed_size(codes, point.scheme.bits) + 4 * scalars


def stored_shape(point: Point) -> tuple[int, ...]:
    """Shape of a weight or static operand as its quantizer gets it."""
    called = point.what == "weight" and point.node.op == "call_module"
    return point.weight_shape if called else tuple(point.node.meta["val"].shape)


def summary(model: nn.Module) -> Summary:
    """Every site of a prepared or deployed model, float ones with the reason. ``print`` the result.

    For a prepared model the bytes are those that ``convert`` will give.
    """
    runtime = runtime_of(model)
    ensure_traced(model)
    record = runtime.records[0]
    trace = record.trace
    plans = [r.plan for r in runtime.records if not any(r.mode.values())]  # as convert does
    absorbed = foldable(model, plans, runtime.activations) if runtime.stage == "prepared" else {}
    by_site = operands_of(record)
    owned: dict[str, int] = {}
    for p in record.plan.points:
        first = p.uses[0][0].name
        owned[first] = owned.get(first, 0) + _point_bytes(p, runtime, absorbed)
    rows = []
    health = weight_rows(model)
    fused = record.kernels(model)
    for site in record.plan.sites:
        points = by_site.get(site.name, {})
        weight = points.get("weight")
        acts = [p for p in points.values() if p.what != "weight"]
        w, a = site_widths({name: p.scheme.bits for name, p in points.items()})
        scheme = f"A{a}" if site.kind == "scan" else f"W{w}A{a}"
        methods = "/".join(
            dict.fromkeys([*([weight.scheme.method] if weight else []), *(p.scheme.method for p in acts)])
        )
        folded = [
            p.name for p in acts if p.what == "activation" and p.scheme.method == "dls" and p.axis is None
        ]
        note = record.plan.floats.get(site.name, "")
        if folded and runtime.config.statistics == "sample":
            note = "statistics per tensor: the code folds the batch away"
        if site.role is not None:
            window = site.scan.get("window")
            kind = f"{site.role.kind}_lb, window {window}" if window else site.role.kind
            note = "; ".join(part for part in (kind, note) if part not in ("", "s6"))
        if weight is not None and weight.key in runtime.rounded:
            note = "; ".join(part for part in (note, runtime.rounded[weight.key]) if part)
        kernel = "fake-quantized"
        if runtime.stage == "deployed":
            kernel = fused.get(site.name, "dequantize + torch")
        size = owned.get(site.name, 0)
        if weight is None and site.parameter:
            size += 4 * math.prod(_weight_shape(model, site))
        looked = health[weight.name] if weight is not None else None
        rows.append(
            SummaryRow(
                site.name, site.kind, scheme if points else "float", methods, size,
                bit_operations(model, record, site, w, a), kernel if points else fused.get(site.name, "torch"), note,
                looked.dead_levels if looked else None, looked.zero_ratio if looked else None,
                bit_operations(model, record, site, 32, 32),
            )
        )  # fmt: skip
    outside = [p for p in record.plan.parameters if not p.must_cover]
    uncovered = tuple((p.name, f"{p.reason} at {p.where}") for p in record.plan.parameters if p.must_cover)
    floats = tuple((p.name, p.reason) for p in outside)
    sited = {s.parameter for s in record.plan.sites if s.parameter}
    for s in record.plan.sites:
        sited |= {str(n.target) for o in s.inputs for n in _parameters_of(record, o.node)}
    packed = sum(_point_bytes(p, runtime, absorbed) for p in record.plan.points)
    covered = _covered(record)
    ours = {id(p) for p in runtime.parameters()} | {id(b) for b in runtime.buffers()}
    rest = 0
    values = sum(math.prod(s) for s, _ in runtime.dropped.values())
    for name, t in _tensors(model):
        if id(t) in ours:
            continue
        values += t.numel()
        if name not in covered:
            half = runtime.float_dtype in (torch.float16, torch.bfloat16)
            rest += t.numel() * (2 if half and t.is_floating_point() else t.element_size())
    shapes = tuple((1, *s[1:]) if (i, 0) in trace.free else s for i, s in enumerate(trace.shapes))
    notes = (*runtime.notes, *(runtime.adapter.notes if runtime.adapter else ()))
    return Summary(
        tuple(rows), packed + rest, rest, values, sum(r.bitops for r in rows), shapes, floats, notes,
        len(sited) + len(uncovered), uncovered, tuple(runtime.transforms.applied),
        tuple((s.kind, s.site, s.reason) for s in runtime.transforms.skipped),
    )  # fmt: skip


def _parameters_of(record: Record, node: fx.Node) -> list[fx.Node]:
    """The parameters that a value is made of, if it is made of nothing else."""
    made_of = ancestors(node)
    if any(n.op == "placeholder" for n in made_of):
        return []
    return [n for n in made_of if n.op == "get_attr" and not str(n.target).startswith("_ssmquant.")]


def _covered(record: Record) -> set[str]:
    out: set[str] = set()
    for p in record.plan.points:
        if p.what == "weight" and p.parameter:
            out.add(p.parameter)
        elif p.what == "static":
            out |= {str(n.target) for n in ancestors(p.node) if n.op == "get_attr"}
    return out


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    skip = {
        f"{m}.{b}" if m else b for m, mod in model.named_modules() for b in mod._non_persistent_buffers_set
    }
    buffers = [(n, b) for n, b in model.named_buffers() if n not in skip]
    return [*model.named_parameters(), *buffers]
