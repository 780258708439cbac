"""Two processes train one prepared model (DDP over gloo)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
WORKER = """
import json, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import ssmquant
from tests.small import tiny_mambair, images
rank, where = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=2)
torch.manual_seed(0)
prepared = ssmquant.prepare(tiny_mambair(), ssmquant.QConfig.qmambair(4), example_inputs=(images(1, 3, 8, 8),))
ddp = DistributedDataParallel(prepared.train())
optimizer = torch.optim.SGD(ssmquant.param_groups(prepared, 1e-2))
result = []
for step in range(2):
    x = (1 + 4 * rank) * images(2, 3, 8, 8, seed=10 * step + rank)  # other data, of another scale, on each rank
    loss = ddp(x).square().mean()
    if step == 0:
        result.append({k: v.tolist() for k, v in prepared.state_dict().items() if "activations" in k})
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
result.append({k: v.tolist() for k, v in prepared.state_dict().items()})
deployed = ssmquant.convert(prepared)
result.append({k: v.tolist() for k, v in deployed.state_dict().items() if k.endswith("codes")})
dist.barrier()
dist.destroy_process_group()
print(json.dumps(result))
"""


def on_two_ranks(worker: str, tmp_path: Path) -> list[Any]:
    """What each of two processes prints in its last line, as JSON."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", worker, str(rank), str(tmp_path / "meet")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for rank in range(2)
    ]
    outputs = []
    try:
        for process in ranks:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err[-3000:]
            outputs.append(json.loads(out.splitlines()[-1].replace("NaN", "null")))
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return outputs


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_ranks_train_one_model(tmp_path: Path) -> None:
    first, second = on_two_ranks(WORKER, tmp_path)
    alphas = {k: v for k, v in first[0].items() if k.endswith("alpha")}
    assert len(alphas) >= 6
    assert all(v[0] > 0 for v in alphas.values())
    for k, v in first[0].items():
        assert v == second[0][k], f"initialised differently: {k}"
    moved = [k for k, v in first[0].items() if v != first[1][k]]
    assert moved
    for k, v in first[1].items():
        assert v == second[1][k], f"differs after two steps: {k}"
    assert first[2] == second[2]
    assert first[2]


CALIBRATION = """
import json, sys, torch, torch.distributed as dist
import ssmquant
from ssmquant.config import TRANSFORMS
from ssmquant.graph.runtime import runtime_of
from tests.gated import TOKENS, float_error, seeded
from tests.graph.test_transforms_calls import Stream
rank, where = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=2)
model = seeded(Stream)
config = ssmquant.QConfig(w_bits=8, a_bits=8, transforms=TRANSFORMS)
prepared = ssmquant.prepare(model, config, example_inputs=TOKENS)
# Other data on each rank, and a graph that the other does not reach.
x = TOKENS * torch.linspace(1, 5, 3).roll(rank)
ssmquant.calibrate(prepared, [{"x": x}] + [{"x": x, "more": True}] * rank)
error = float_error(prepared.eval(), model, TOKENS)
state = {k: v.tolist() for k, v in prepared.state_dict().items() if "activations" not in k}
dist.barrier()
dist.destroy_process_group()
print(json.dumps([error, [list(a) for a in runtime_of(prepared).transforms.applied], state]))
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_ranks_calibrate_one_model(tmp_path: Path) -> None:
    first, second = on_two_ranks(CALIBRATION, tmp_path)
    assert max(first[0], second[0]) < 1e-5
    assert first[1:] == second[1:]
    assert {"state", "dt", "out_rotation"} <= {kind for kind, _, _ in first[1]}
    assert "residual_rotation" not in {kind for kind, _, _ in first[1]}  # which the stream of rank 1 forbids


ROUNDING = """
import json, sys, torch, torch.distributed as dist
import ssmquant
from ssmquant.graph.runtime import runtime_of
from tests.small import Scanner, images
rank, where = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=2)
torch.manual_seed(0)
config = ssmquant.QConfig(w_bits=3, a_bits=8, rounding="gptq", keep_first_last=False)
prepared = ssmquant.prepare(Scanner().eval(), config, example_inputs=images(2, 3, 6, 5))
ssmquant.calibrate(prepared, [images(2, 3, 6, 5, seed=rank)])
state = {k: v.tolist() for k, v in prepared.state_dict().items() if "activations" not in k}
dist.barrier()
dist.destroy_process_group()
print(json.dumps([runtime_of(prepared).rounded, state]))
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_ranks_round_alike(tmp_path: Path) -> None:
    first, second = on_two_ranks(ROUNDING, tmp_path)
    assert len(first[0]) == 5
    assert all(note.startswith("gptq") for note in first[0].values())
    assert first == second
