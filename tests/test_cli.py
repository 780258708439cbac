"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import ssmquant.restore
from ssmquant import cli
from ssmquant.errors import ConfigError, InputError
from ssmquant.restore.jobs import jobs

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    io = pytest.importorskip("ssmquant.io")
    from ssmquant import zoo

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "float.safetensors"
    args = {"embed_dim": 16, "depths": [1], "d_state": 2, "upscale": 2, "upsampler": "pixelshuffledirect"}
    io.save_float(zoo.build({"name": "MambaIR", "args": args}), path, half=True)
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "in.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (11, 18, 4), dtype=np.uint8)).save(path)
    return path


def run(*args: str | Path) -> int:
    return cli.main([str(arg) for arg in args])


def test_restores_a_picture(model_file: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = picture.with_name("out.png")
    assert run("restore", picture, "--model", model_file, "-o", out, "--device", "cpu") == 0
    assert "18x11 -> 36x22, float model on cpu" in capsys.readouterr().out
    with Image.open(out) as image:
        assert (image.size, image.mode) == ((36, 22), "RGBA")
    assert sorted(p.name for p in picture.parent.iterdir()) == ["in.png", "out.png"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--model", "w2a2")], ids=["w4a4", "w2a2"])
def test_restores_with_the_models_that_come_with_it(
    more: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are better than bicubic interpolation by a good deal."""
    from ssmquant.restore import Task, downscale, open_image, to_tensor

    clean = open_image(Path(__file__).parent.parent / "examples" / "photos" / "coffee.png").crop(
        (40, 40, 200, 168)
    )
    small, out = tmp_path / "small.png", tmp_path / "large.png"
    downscale(clean, 2).save(small)
    assert run("restore", small, "-o", out, "--device", "cpu", *more) == 0
    assert "80x64 -> 160x128, quantized model on cpu" in capsys.readouterr().out
    task, target = Task("sr", 2), to_tensor(clean)
    interpolated = to_tensor(open_image(small).resize(clean.size, Image.Resampling.BICUBIC))
    gain = task.score(to_tensor(open_image(out)), target)["psnr"] - task.score(interpolated, target)["psnr"]
    assert gain > 1.5


def test_a_file_goes_before_a_name(
    model_file: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(picture.parent)
    Path("w4a4").write_bytes(model_file.read_bytes())
    assert run("restore", picture, "-o", "out.png", "--device", "cpu") == 0
    assert "float model" in capsys.readouterr().out


def test_an_installation_without_models(
    picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ssmquant.restore import shipped, shipped_model

    with pytest.raises(ConfigError, match=r"no model 'w3a3'.*w4a4, w2a2"):
        shipped_model("w3a3")
    monkeypatch.setattr(shipped, "_FOLDERS", (picture.parent,))
    assert "missing in this installation" in failure(capsys, "restore", picture, "-o", "out.png")


@pytest.mark.slow
def test_restores_with_a_quantized_file(
    model_file: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import ssmquant
    from ssmquant.io import load_float

    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    prepared = ssmquant.prepare(load_float(model_file), ssmquant.QConfig.qmambair(4), example_inputs=(x,))
    ssmquant.calibrate(prepared, [x])
    quantized = picture.with_name("w4.safetensors")
    ssmquant.save(ssmquant.convert(prepared), quantized)
    out = picture.with_name("out.png")
    assert (
        run(
            "restore",
            picture,
            "--model",
            quantized,
            "-o",
            out,
            "--device",
            "cpu",
            "--tile",
            "16",
            "--overlap",
            "4",
        )
        == 0
    )
    assert "quantized model" in capsys.readouterr().out
    with Image.open(out) as image:
        assert image.size == (36, 22)
        pixels = np.asarray(image)
    more = ("--tile", "16", "--overlap", "4", "--statistics", "tile", "--force", "--device", "cpu")
    assert run("restore", picture, "--model", quantized, "-o", out, *more) == 0
    with Image.open(out) as image:
        assert not np.array_equal(np.asarray(image), pixels)  # ranges of each tile, not of the picture
    capsys.readouterr()
    assert run("summary", quantized) == 0
    assert "quantized" in capsys.readouterr().out


def test_summary_of_a_float_file(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ssmquant.io import load_float

    assert run("summary", model_file) == 0
    count = sum(p.numel() for p in load_float(model_file).parameters())
    assert f"{count:,} parameters" in capsys.readouterr().out


def failure(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    assert run(*args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ssmquant: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_never_writes_over_the_input(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = picture.read_bytes()
    (tmp_path / "link.png").symlink_to(picture)
    for out in (picture, tmp_path / "link.png"):
        assert "is the input" in failure(capsys, "restore", picture, "--model", "m", "-o", out, "--force")
    (tmp_path / "old.png").write_bytes(b"old")
    assert "--force" in failure(capsys, "restore", picture, "--model", "m", "-o", tmp_path / "old.png")
    assert picture.read_bytes() == before
    assert (tmp_path / "old.png").read_bytes() == b"old"


def test_restores_folders(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for name, width in (("in/a.png", 7), ("in/b.jpg", 8), ("c.png", 9)):
        Image.new("RGB", (width, 6), (200, 30, 90)).save(tmp_path / name)
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    out = tmp_path / "out"
    command = (
        "restore",
        tmp_path / "in",
        tmp_path / "c.png",
        "--model",
        model_file,
        "-o",
        out,
        "--device",
        "cpu",
    )
    assert run(*command) == 0
    assert capsys.readouterr().out.count("float model on cpu") == 3
    for name, width in (("a", 14), ("b", 16), ("c", 18)):
        with Image.open(out / f"{name}.png") as image:
            assert image.size == (width, 12)
    (out / "c.png").unlink()
    assert "a.png exists" in failure(capsys, *command)
    assert not (out / "c.png").exists()
    assert run(*command, "--force") == 0
    capsys.readouterr()
    # One picture goes to a folder that is there, and what cannot be read does not stop the others.
    assert "c.png exists" in failure(
        capsys, *("restore", tmp_path / "c.png", "--model", model_file, "-o", out)
    )
    (tmp_path / "in" / "a0.png").write_bytes(b"nonsense")
    assert (
        run("restore", tmp_path / "in", "--model", model_file, "-o", tmp_path / "more", "--device", "cpu")
        == 2
    )
    said = capsys.readouterr()
    assert "a0.png" in said.err
    assert "1 of 3 pictures could not be restored" in said.err
    assert sorted(p.name for p in (tmp_path / "more").iterdir()) == ["a.png", "b.png"]


def test_pictures_that_fail_do_not_stop_the_others(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for name, width in (("a.png", 7), ("c.png", 8), ("d.png", 9)):
        Image.new("RGB", (width, 6), (200, 30, 90)).save(tmp_path / "in" / name)
    Image.new("F", (4, 4)).save(tmp_path / "in" / "b.tif")
    restore = ssmquant.restore.restore_image

    def hungry(model: Any, image: Image.Image, *args: Any, **more: Any) -> Image.Image:
        if image.width == 8:
            raise torch.OutOfMemoryError("no memory")
        return restore(model, image, *args, **more)

    monkeypatch.setattr(ssmquant.restore, "restore_image", hungry)
    command = "restore", tmp_path / "in", "--model", model_file, "-o", tmp_path / "out", "--device", "cpu"
    assert run(*command) == 2
    said = capsys.readouterr().err
    assert re.search(r"b\.tif: .*floating-point", said)
    assert re.search(r"c\.png: no memory", said)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "d.png"]
    single = (
        "restore",
        tmp_path / "in" / "c.png",
        "--model",
        model_file,
        "-o",
        tmp_path / "c.png",
        "--device",
        "cpu",
    )
    assert "try a smaller --tile" in failure(capsys, *single)
    # A folder that cannot be made is noticed before any work; who reads no more gets all pictures.
    monkeypatch.setattr(ssmquant.restore, "restore_image", restore)
    made = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError("not here")))
    assert "not here" in failure(capsys, *command[:5], tmp_path / "new", *command[6:])
    monkeypatch.setattr(Path, "mkdir", made)
    (tmp_path / "in" / "b.tif").unlink()
    monkeypatch.setattr("builtins.print", lambda *_, **__: (_ for _ in ()).throw(BrokenPipeError()))
    assert run(*command[:5], tmp_path / "new", *command[6:]) == 0
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a.png", "c.png", "d.png"]


def test_where_pictures_go(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.png", "in/a.jpg", "in/b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    a, folder = tmp_path / "a.png", tmp_path / "in"
    assert jobs([a], tmp_path / "new.tif") == [(a, tmp_path / "new.tif")]
    assert jobs([a], folder) == [(a, folder / "a.png")]
    assert jobs([a, folder / "b.png"], tmp_path / "new") == [
        (a, tmp_path / "new" / "a.png"), (folder / "b.png", tmp_path / "new" / "b.png"),
    ]  # fmt: skip
    assert jobs([a, a], tmp_path / "new") == [(a, tmp_path / "new" / "a.png")]
    for sources, output, said in (
        ([a, folder], tmp_path / "new", "would both be written to"),
        ([folder], folder, "b.png is the input"),
        ([a, folder], a, "is no folder"),
        ([folder], tmp_path / "no" / "such", "no such folder as"),
        ([a], tmp_path, "a.png is the input"),
    ):
        with pytest.raises(ConfigError, match=said):
            jobs(sources, output, force=True)
    with pytest.raises(InputError, match="no such file or folder"):
        jobs([a, tmp_path / "b.png"], tmp_path / "new")


def test_errors_are_one_line(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.png"
    (tmp_path / "bad.png").write_bytes(b"nonsense")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")

    def restore(image: Path = picture, model: str = "foreign", out: Path = out, *more: str) -> str:
        file = tmp_path / f"{model}.safetensors"
        return failure(capsys, "restore", image, "--model", file, "-o", out, "--device", "cpu", *more)

    assert "not written by ssmquant" in restore()
    assert "no such file" in restore(model="missing")
    assert "not a whole safetensors file" in restore(model="bad")
    assert "No such file" in restore(tmp_path / "missing.png")
    assert "cannot read" in restore(tmp_path / "bad.png")
    assert "no such folder" in restore(out=tmp_path / "nowhere" / "out.png")
    assert "is the input" in restore(out=tmp_path)
    assert "suffix '.xyz'" in restore(out=tmp_path / "out.xyz")
    assert "JPEG cannot hold" in restore(out=tmp_path / "out.jpg")
    assert "device 'cuda:99'" in failure(
        capsys, "restore", picture, "--model", "m", "-o", out, "--device", "cuda:99"
    )
    assert "not a whole safetensors file" in failure(capsys, "summary", tmp_path / "bad.safetensors")
    assert not out.exists()


FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.mix = nn.Linear(8, 8)
        self.q = nn.Parameter(torch.rand(8, 8))
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x):
        y = self.mix(self.first(x).flatten(2).transpose(1, 2))
        modulated = self.q * y.mean()  # a weight made of activations: nothing covers it
        y = nn.functional.linear(y, modulated)
        return self.last(y.transpose(1, 2).unflatten(2, x.shape[2:]))

def make():
    return Net()

def needs(width):
    return Net()

number = 3
"""


def test_summary_of_a_factory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some_nets.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for target in ("some_nets:make", "some_nets:Net", "some_nets.py:make"):
        assert run("summary", target, "--input", "1,3,12,10", "--w-bits", "3") == 0
        out = capsys.readouterr().out
        assert "mix    linear  W3A4" in out
        assert "NOT COVERED: q (" in out
    assert "no adapter knows an example input" in failure(capsys, "summary", "some_nets:make")
    assert "expected sizes" in failure(capsys, "summary", "some_nets:make", "--input", "1,a")
    assert "has no missing" in failure(capsys, "summary", "some_nets:missing")
    assert "takes no arguments" in failure(capsys, "summary", "some_nets:needs")
    assert "cannot be imported" in failure(capsys, "summary", "no_such_nets:make")
    assert "gave a int" in failure(capsys, "summary", "builtins:int")


def test_a_bad_tile_is_refused(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = picture.with_name("out.png")

    def refused(*options: str) -> str:
        """Before anything is read: there is no such model."""
        return failure(capsys, "restore", picture, "--model", "m", "-o", out, *options)

    assert "twice the overlap" in refused("--tile", "20")
    assert "at least 16 pixels" in refused("--tile", "8", "--overlap", "2")
    assert "at least 16 pixels" in refused("--tile", "-256")
    assert "twice the overlap" in refused("--overlap", "-1")
    assert not out.exists()


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    path = tmp_path / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 40), dtype=np.uint8)).save(path)
    return path


def test_tiles_and_progress(
    model_file: Path, wide: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def restored(*options: str) -> tuple[np.ndarray, str]:
        out = wide.with_name("out.png")
        device = ("--device", "cpu", "--force")
        assert run("restore", wide, "--model", model_file, "-o", out, *device, *options) == 0
        with Image.open(out) as image:
            return np.asarray(image), capsys.readouterr().err

    tiles = ("--tile", "16", "--overlap", "4")  # from 0, 12 and 24
    whole, said = restored()
    assert said == ""
    assert np.array_equal(restored("--tile", "0")[0], whole)
    assert np.array_equal(restored("--tile", "auto")[0], whole)
    cut, said = restored(*tiles)
    assert said == ""  # a line every ten seconds at most
    assert 0 < np.abs(cut.astype(int) - whole).max() < 64

    monkeypatch.setattr(cli, "_SECONDS", 0.0)
    assert restored(*tiles)[1].splitlines() == [f"restoring: {i} of 3 tiles" for i in range(4)]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    again, said = restored(*tiles)
    assert "3/3 tiles" in re.sub("\x1b[^a-zA-Z]*[a-zA-Z]", "", said)
    assert np.array_equal(again, cut)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert "restoring: 3 of 3 tiles" in restored(*tiles)[1]


def test_a_broken_model_writes_nothing(
    model_file: Path, wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ssmquant.io import load_float, save_float

    model = load_float(model_file)
    torch.nn.init.constant_(model.upsample[0].bias, torch.nan)
    save_float(model, tmp_path / "nan.safetensors")
    out = tmp_path / "out.png"
    more = ("--device", "cpu", "--tile", "16", "--overlap", "4")
    assert "not finite" in failure(
        capsys, "restore", wide, "--model", tmp_path / "nan.safetensors", "-o", out, *more
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nan.safetensors", "wide.png"]


RESTORE = ["restore", "a", "--model", "m", "-o", "b"]


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["restore"],
        ["frobnicate"],
        ["summary"],
        ["restore", "a", "--model"],
        [*RESTORE, "--tile", "big"],
        [*RESTORE, "--tile", "3.5"],
        [*RESTORE, "--statistics", "row"],
    ],
)
def test_usage_errors(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_env_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ssmquant", "env"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert {"ssmquant", "python", "torch", "triton", "cpu", "cuda"} <= set(names)
    lines = done.stderr.splitlines()
    assert all(line.startswith("ssmquant: ") for line in lines), lines  # that kernels are being compiled
