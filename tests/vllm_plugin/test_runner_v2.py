"""The plugin with vLLM's runner V2, the default on GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_runner_v2_gives_the_same_tokens(llama: Path) -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(here / "interpreted.py"), str(llama)],
        env={**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert result["wrong"] == []
    assert result["cached"] == 12 * 128
    assert result["preempted"] >= 2
