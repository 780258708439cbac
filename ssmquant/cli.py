"""The command ``ssmquant``: restore a picture with a saved model, look into a file, look at the environment.

Exit status: 0 done, 2 the user can mend it (one line on stderr says how). Nothing is written until it is complete.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssmquant.errors import ConfigError, InputError, SsmquantError

__all__ = ["load_any", "main"]


def load_any(path: str | os.PathLike[str]) -> tuple[nn.Module, str]:
    """A zoo model from a file of :func:`ssmquant.save` or :func:`ssmquant.io.save_float`: (model, quantized or float).

    Which of the two it is stands in the file's metadata. ``path`` may be the name of a model that comes with the
    library, where there is no such file. Raises FormatError for any other file.
    """
    from ssmquant import io
    from ssmquant.restore.shipped import SHIPPED, shipped_model

    if str(path) in SHIPPED and not Path(path).exists():
        path = shipped_model(str(path))
    kind = io.peek(path)
    return (io.load_float(path) if kind == "float" else io.load(path)), kind


def _restore(args: argparse.Namespace) -> None:
    from ssmquant.restore import model_scale, open_image, restore_image, save_image
    from ssmquant.restore.jobs import jobs
    from ssmquant.restore.pictures import check_target
    from ssmquant.restore.tiling import check_tile

    check_tile(args.tile, args.overlap)
    pairs = jobs(args.images, args.output, force=args.force)
    device = _device(args.device)
    several = len(pairs) > 1
    first = None if several else open_image(pairs[0][0])
    if first is not None:  # before the work, not after it
        check_target(pairs[0][1], first.mode)
    model, kind = load_any(args.model)
    pairs[0][1].parent.mkdir(exist_ok=True)
    model = model.to(device)
    failed = 0
    for index, (source, target) in enumerate(pairs):
        title = f"restoring {source.name} ({index + 1} of {len(pairs)})" if several else "restoring"
        try:
            image = open_image(source) if first is None else first
            with _progress(title) as progress:
                result = restore_image(
                    model,
                    image,
                    model_scale(model),
                    args.tile,
                    args.overlap,
                    statistics=args.statistics,
                    progress=progress,
                )
            save_image(result, target)
        except (SsmquantError, OSError, torch.OutOfMemoryError) as error:
            if not several:
                raise
            failed += 1
            said = f"{source}: {' '.join(str(error).split())}"
            print("ssmquant: error:", said, file=sys.stderr, flush=True)
            continue
        sizes = f"{image.width}x{image.height} -> {result.width}x{result.height}"
        with contextlib.suppress(BrokenPipeError):  # who reads no more still wants the pictures
            print(f"{target}: {sizes}, {kind} model on {device}", flush=True)
    if failed:
        raise InputError(f"{failed} of {len(pairs)} pictures could not be restored")


_SECONDS = 10.0
"""Between two plain lines of progress."""


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A callback for calls that are done and all: a bar on a terminal, else a line on stderr every ten seconds."""
    if sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tiles"))
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _SECONDS:
            last = time.monotonic()
            print(f"{title}: {done} of {total} tiles", file=sys.stderr, flush=True)

    yield line


def _tile(text: str) -> int | str | None:
    """The argument of ``--tile``; 0 is the whole picture."""
    if text == "auto":
        return text
    try:
        return int(text) or None
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected pixels, 0 or auto, not {text!r}") from None


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _factory(path: str) -> nn.Module:
    """The model that ``package.module:function`` or ``file.py:function`` makes (a class will do, or a model itself)."""
    name, _, attribute = path.rpartition(":")
    sys.path.insert(0, os.getcwd())
    try:
        if name.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(name).stem, name)
            if spec is None or spec.loader is None or not Path(name).is_file():
                raise ConfigError(f"no such file: {name}")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{name} cannot be imported ({error}); if it is a kernel that is missing, try --standins"
        ) from error
    made: Any = module
    for part in attribute.split("."):
        if not hasattr(made, part):
            raise ConfigError(f"{name} has no {attribute}")
        made = getattr(made, part)
    if not isinstance(made, nn.Module):
        try:
            made = made()
        except TypeError as error:
            raise ConfigError(
                f"{attribute}() failed: {error}. Give a function that takes no arguments"
            ) from error
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{attribute}() gave a {type(made).__name__}, not an nn.Module")
    return made


def _example(text: str) -> torch.Tensor:
    """``1,3,224,224`` or ``1,128:int64`` -> zeros of that shape."""
    shape, _, kind = text.partition(":")
    dtype = getattr(torch, kind or "float32", None)
    try:
        sizes = [int(s) for s in shape.replace("x", ",").split(",")]
        if min(sizes) < 1 or not isinstance(dtype, torch.dtype):
            raise ValueError
        return torch.zeros(sizes, dtype=dtype)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--input {text!r}: expected sizes, like 1,3,224,224 or 1,128:int64") from error


def _look(args: argparse.Namespace) -> None:
    import ssmquant
    from ssmquant.workflow import prepare_unchecked

    if args.standins:
        ssmquant.install_standins()
    model = _factory(args.file)
    config = ssmquant.QConfig(w_bits=args.w_bits, a_bits=args.a_bits)
    inputs = tuple(_example(text) for text in args.input) or None
    print(ssmquant.summary(prepare_unchecked(model, config, inputs, method=args.method)))


def _summary(args: argparse.Namespace) -> None:
    import ssmquant

    if ":" in args.file and not Path(args.file).exists():
        _look(args)
        return
    model, kind = load_any(args.file)
    print(f"{args.file}: {kind}, {Path(args.file).stat().st_size:,} bytes on disk")
    if kind == "float":
        count = sum(p.numel() for p in model.parameters())
        print(f"{type(model).__name__} {getattr(model, 'zoo_config', '')}: {count:,} parameters")
        return
    print(ssmquant.summary(model))


MOST_IMAGES = 16
"""Pictures that a report looks at."""


def _report(args: argparse.Namespace) -> None:
    import ssmquant
    from ssmquant.files import check_new
    from ssmquant.graph.runtime import is_prepared
    from ssmquant.workflow import prepare_unchecked

    target = check_new(args.output, force=args.force)
    if target.exists() and any(Path(p).exists() and target.samefile(p) for p in (args.file, *args.images)):
        raise ConfigError(f"{target} is an input; name another output")
    crops, found = _crops(args.images, args.crop)
    if args.standins:
        ssmquant.install_standins()
    inputs = tuple(_example(text) for text in args.input) or None
    imported = ":" in args.file and not Path(args.file).exists()
    model = _factory(args.file) if imported else load_any(args.file)[0]
    reference = None
    try:
        if not is_prepared(model):
            preset = getattr(ssmquant.QConfig, args.preset or "qmambair")
            w_bits, a_bits = (4 if bits is None else bits for bits in (args.w_bits, args.a_bits))
            config = preset(w_bits, a_bits=a_bits)
            reference = model if crops else None
            model = prepare_unchecked(model, config, inputs, method=args.method)
            if crops:
                ssmquant.calibrate(model, crops)
        elif (args.preset, args.w_bits, args.a_bits) != (None, None, None):
            raise ConfigError(
                f"{args.file} is quantized; --preset, --w-bits and --a-bits are for float models"
            )
        ssmquant.report(model, target, crops or None, reference=reference, title=args.title, force=args.force)
    except SsmquantError:
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AssertionError) as error:
        if not crops:
            raise
        shapes = ", ".join(sorted({"x".join(map(str, crop.shape)) for crop in crops}))
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"the model does not take pictures of {shapes} (see --crop): {reason}") from error
    of = f"{len(crops)} of {found} pictures" if crops else "no pictures: weights only"
    print(f"{target}: {target.stat().st_size:,} bytes, {of}")


def _crops(sources: Sequence[str], size: int) -> tuple[list[torch.Tensor], int]:
    """Centre crops, (1, 3, H, W) each, of the first pictures of files and folders, and how many there are."""
    from ssmquant.restore import find_images, open_image, to_tensor

    if size < 1:
        raise ConfigError(f"--crop {size}: expected pixels, 1 or more")
    paths = [path for source in sources for path in find_images(source)]
    crops = []
    for path in paths[:MOST_IMAGES]:
        x = to_tensor(open_image(path))
        top, left = (max(n - size, 0) // 2 for n in x.shape[2:])
        crops.append(x[:, :, top : top + size, left : left + size].contiguous())
    return crops, len(paths)


def _presets() -> list[str]:
    """The class methods of QConfig that make configurations of bits."""
    from ssmquant import QConfig

    return sorted(n for n, f in vars(QConfig).items() if isinstance(f, classmethod) and "from_" not in n)


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _env(args: argparse.Namespace) -> None:
    import ssmquant

    rows = [
        ("ssmquant", str(getattr(ssmquant, "__version__", "unknown"))),
        ("python", f"{platform.python_version()}, {platform.platform()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        *(
            (name, _version(name))
            for name in ("numpy", "safetensors", "triton", "pillow", "rich", "matplotlib")
        ),
        ("cpu", f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"),
        ("cuda", _cuda()),
    ]
    report: Callable[[], list[tuple[str, str, str]]] | None
    report = getattr(getattr(ssmquant, "ops", None), "backend_report", None)
    rows += [(f"kernel {name}", f"{state}: {why}") for name, state, why in (report() if report else [])]
    rows += [(f"package {row[0]}", ", ".join(row[1:])) for row in ssmquant._standins.standins_report()]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cuda() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return (
            f"torch is built for CUDA {built}, but no device is usable" if built else "torch is a CPU build"
        )
    names = [
        f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    ]
    return f"{torch.version.cuda}: {', '.join(names)}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """One line, without the usage block."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _add_tracing(command: argparse.ArgumentParser) -> None:
    """How a function's model is traced."""
    command.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SIZES",
        help="of an example input, 1,3,224,224 or 1,128:int64; once for each argument; not needed where an adapter "
        "knows the model",
    )
    command.add_argument("--method", default="forward", metavar="NAME", help="the method to trace")
    command.add_argument(
        "--standins", action="store_true", help="serve missing mamba-ssm, causal-conv1d ... by ssmquant's own"
    )


def _parser() -> argparse.ArgumentParser:
    from ssmquant import __version__

    parser = _Parser(prog="ssmquant", description="Quantized Mamba-family vision models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ssmquant {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    restore = commands.add_parser(
        "restore", help="enlarge pictures twice, or restore them with any saved zoo model, float or quantized"
    )
    restore.add_argument("images", nargs="+", metavar="IMAGE", help="picture, or folder of pictures")
    restore.add_argument(
        "--model",
        default="w4a4",
        metavar="FILE",
        help="of ssmquant.save or save_float, or w4a4 (default) or w2a2: MambaIR-light x2 at 4 or 2 bits",
    )
    restore.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="picture to write, whose suffix is the format; of several pictures or a folder: a folder for .png files",
    )
    restore.add_argument(
        "--tile",
        type=_tile,
        default="auto",
        metavar="N",
        help="work in tiles of N x N input pixels; 0: the whole picture at once; auto (default): tiles of 256 for "
        "pictures of more than 512 x 512 pixels",
    )
    restore.add_argument(
        "--overlap", type=int, default=32, metavar="N", help="pixels that tiles share (default 32)"
    )
    restore.add_argument(
        "--statistics",
        choices=("picture", "tile"),
        default="picture",
        help="where ranges of dynamic DLS come from when there are tiles: a pass over the whole picture before "
        "(default), or each tile, which is faster and may show seams",
    )
    restore.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    restore.add_argument("--force", action="store_true", help="replace existing outputs")
    restore.set_defaults(run=_restore)

    summary = commands.add_parser(
        "summary",
        help="every site of a saved model, or of any model that can be imported: scheme, bytes, operations, coverage",
    )
    summary.add_argument(
        "file",
        metavar="FILE|MODULE:FUNCTION",
        help="saved model, or a function without arguments that makes one",
    )
    summary.add_argument("--w-bits", type=int, default=4, metavar="N", help="(default 4)")
    summary.add_argument("--a-bits", type=int, default=4, metavar="N", help="(default 4)")
    _add_tracing(summary)
    summary.set_defaults(run=_summary)

    report = commands.add_parser(
        "report",
        help="one HTML page about a model: the summary, SQNR, histograms of weights and activations with their levels",
    )
    report.add_argument(
        "file",
        metavar="FILE|MODULE:FUNCTION",
        help="saved model, or a function without arguments that makes one; a float one is quantized first",
    )
    report.add_argument("-o", "--output", required=True, metavar="OUT", help="page to write")
    report.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="PATH",
        help=f"pictures or folders of them, to measure activations (and calibrate a float model): the first "
        f"{MOST_IMAGES}, as RGB in 0..1; without, the page shows weights only",
    )
    report.add_argument(
        "--crop", type=int, default=128, metavar="N", help="use N x N pixels of their middle (default 128)"
    )
    report.add_argument(
        "--preset", choices=_presets(), help="of QConfig, for a float model (default qmambair)"
    )
    report.add_argument("--w-bits", type=int, metavar="N", help="for a float model (default 4)")
    report.add_argument("--a-bits", type=int, metavar="N", help="for a float model (default 4)")
    report.add_argument("--title", metavar="TEXT", help="of the page")
    report.add_argument("--force", action="store_true", help="replace an existing page")
    _add_tracing(report)
    report.set_defaults(run=_report)

    env = commands.add_parser("env", help="versions, hardware, and which kernels are used and why")
    env.set_defaults(run=_env)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    try:
        args = _parser().parse_args(argv)
        args.run(args)
    except BrokenPipeError:  # ssmquant summary ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except torch.OutOfMemoryError:
        print(
            "ssmquant: error: out of memory on the device; try a smaller --tile, or --device cpu",
            file=sys.stderr,
        )
        return 2
    except (SsmquantError, OSError) as error:
        print("ssmquant: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ssmquant: interrupted", file=sys.stderr)
        return 130
    return 0
