"""Training with the Triton kernels, interpreted on a CPU: the command, a few steps, the losses of the other kernels."""

import numpy as np
import pytest

from dass.run_log import read_metrics
from dass.train import main
from dass_ops import Backend, available_backends

TINY = """
    --preset none --data.synthetic.train-clips 16 --data.synthetic.eval-clips 4 --data.synthetic.seconds 1.5
    --data.mel-bins 16 --data.workers 0 --model.size tiny --model.depths 1 1 --model.dims 8 16
    --train.epochs 1 --train.batch-size 4
    --train.precision float32 --log.every 1 --log.progress off --log.no-pictures --run.device cpu
"""


def losses(folder, backend):
    assert main([*TINY.split(), "--backend", backend, "--run.folder", str(folder)]) in (0, None)
    records = read_metrics(folder / "metrics.jsonl")
    (final,) = [record for record in records if record["event"] == "epoch"]
    return [record["loss"] for record in records if record["event"] == "step"] + [final["validation_loss"]]


def test_a_few_steps_are_those_of_the_cpu_kernels(tmp_path):
    if Backend.TRITON not in available_backends("cpu"):
        pytest.skip("triton cannot run on CPU tensors here: python -m dass_ops says why")
    found = losses(tmp_path / "triton", "triton")
    assert len(found) == 5 and np.isfinite(found).all()
    assert len(set(found)) == 5, "the weights do not change"
    np.testing.assert_allclose(found, losses(tmp_path / "cpu", "cpu"), rtol=2e-5)
    assert 'backend = "triton"' in (tmp_path / "triton" / "config.toml").read_text()
