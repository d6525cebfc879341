"""The precision that training computes in, and how fast it could be."""

from __future__ import annotations

import subprocess
import sys

from hfscratch.training import precision
from tests import kills

UNEQUAL = """
import sys
import torch
from hfscratch.training import precision, processes
torch.distributed.init_process_group("gloo")
torch.set_num_threads((1, precision.MANY_CORES)[torch.distributed.get_rank()])
rate = precision.matrix_rate("fp32", 2)
sys.stdout.write(f"{rate.flops_per_s}|{rate.source}\\n")  # at once, since both write to one pipe
processes.end(0)
"""


def test_processes_of_unequal_numbers_of_threads_measure_what_all_of_them_try(tmp_path):
    script = tmp_path / "unequal.py"
    script.write_text(UNEQUAL)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=kills.ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = done.stdout.strip().splitlines()
    assert one == two
    rate, source = one.split("|")
    tried = [f"measured: fp32 products of {size} × {size}, " for size in precision.CPU_SIZES]
    assert float(rate) > 1e8 and source.startswith(tuple(tried))
    assert source.endswith(f", 1 to {precision.MANY_CORES} threads, 2 processes at the same time")
