"""The first training batch initialises all ranks alike (two processes, gloo)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssmquant.quantizers import QUANTIZERS

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import json, sys, torch, torch.distributed as dist
from ssmquant.quantizers import PTS, QUANTIZERS
rank, where = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=2)
generator = torch.Generator().manual_seed(3)
data = torch.rand(5, 40, generator=generator) - 0.3
# Rank 1 sees other signs and another scale, and then nothing at all or only zeros.
own = {"split": (data[:2].abs(), 7 * data[2:]), "empty": (data, data[:0]), "zeros": (data, 0 * data)}
result = {}
for case, batches in own.items():
    for name, cls in QUANTIZERS.items():
        for official in (False, True):
            q = cls(4, official=official).train()
            q(batches[rank])
            result[f"{case} {name} {official}"] = {k: v.tolist() for k, v in q.state_dict().items()}
    q = PTS(4, position_axes=(1,)).train()  # of sequences that are shorter on one rank
    q(batches[rank][:, : 40 - 10 * rank])
    result[f"{case} positions"] = {k: v.tolist() for k, v in q.state_dict().items()}
weight = QUANTIZERS["rfa"](4, is_weight=True).train()
if rank == 0:
    weight(data)  # a weight never communicates, or this would hang
print(json.dumps(result))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_ranks_start_alike(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "meet")],
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
            out, err = process.communicate(timeout=100)
            assert process.returncode == 0, err
            outputs.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    first, second = outputs
    assert len(first) == 3 * (2 * len(QUANTIZERS) + 1)
    assert first == second
    # ... and as one process would that sees both batches.
    data = torch.rand(5, 40, generator=torch.Generator().manual_seed(3)) - 0.3
    whole = torch.cat((data[:2].abs(), 7 * data[2:]))
    for name, cls in QUANTIZERS.items():
        alone = cls(4).train()
        alone(whole)
        for key, value in alone.state_dict().items():
            got = torch.tensor(first[f"split {name} False"][key], dtype=value.dtype)
            torch.testing.assert_close(got, value, rtol=1e-6, atol=1e-7)
