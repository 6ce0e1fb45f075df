"""MiLoRA's parameters sharded by FSDP: two processes train to the same weights as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys
from pathlib import Path
import torch
from support.adapted import adapted
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

torch.set_num_threads(1)
distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
tokens = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
labels = torch.where(torch.arange(6) < 3, -100, tokens)


def train(model):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=labels)["loss"].backward()
        optimizer.step()


whole, sharded = (adapted("llama", top_k=2).model.train() for _ in range(2))
for block in sharded.get_base_model().model.layers:
    fully_shard(block, mesh=mesh)
fully_shard(sharded, mesh=mesh)
train(whole)
train(sharded)
ends = {
    name: (parameter.full_tensor().detach(), expected.detach())
    for (name, parameter), expected in zip(sharded.named_parameters(), whole.parameters(), strict=True)
    if expected.requires_grad
}
torch.save(ends, Path(sys.argv[1]) / f"{distributed.get_rank()}.pt")
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_parameters_train_alike(tmp_path: Path) -> None:
    """Both processes get the same rows, so their mean equals one process's; Theta trains with the other parameters."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    port = ["--master_port", str(26500 + os.getpid() % 1000)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *port]
    command = [*launcher, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for process in (0, 1):
        ends = torch.load(tmp_path / f"{process}.pt")
        assert any(".activation." in name for name in ends)
        for name, (actual, expected) in ends.items():
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
