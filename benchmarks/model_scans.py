"""The scans that the model can be run with, in place of dass_ops.ss2d_projected: ours, pipelines around a plain selective
scan, and none."""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch
from implementations import for_tests_only, own_scan, project, unfused
from peers import PEERS, flipped, hoisted_loop
from torch import Tensor

import dass.ss2d
import dass_ops
from dass.model import DASSConfig

FLAGS = (False, False, True, True)
NOTHING, PROJECTION, LOOP = "no scan", "no scan, projection kept", "PyTorch loop"


def scans(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """By name: functions with the signature of dass_ops.ss2d_projected."""
    found = {}
    for backend in map(str, dass_ops.available_backends(device)):
        if backend == "reference" or not for_tests_only(backend, device.type):
            found[f"dass_ops {backend}"] = partial(_ours, backend)
        if not for_tests_only(backend, device.type):
            found[f"unfused {backend}"] = partial(_around, own_scan(backend, FLAGS))
    for peer in PEERS:
        if peer.name in ("mamba_ssm", "vmamba") and not peer.unavailable(device.type):
            found[f"unfused {peer.name}"] = partial(_around, flipped(peer.load(None, FLAGS), FLAGS))
    found[LOOP] = partial(_around_in_float32, flipped(hoisted_loop, FLAGS))
    return found | {NOTHING: _nothing, PROJECTION: _projection_only}


def _ours(name, *arguments, out_dtype=None, **_):
    return dass_ops.ss2d_projected(*arguments, out_dtype=out_dtype, backend=name)


def _around(scan, x, weight, *parameters, out_dtype=None, **_):
    y = unfused(scan, "ss2d_projected")(x, weight.to(x.dtype), *parameters)
    return y.to(out_dtype or x.dtype)


def _around_in_float32(scan, x, *parameters, out_dtype=None, **_):
    with torch.autocast(x.device.type, enabled=False):
        return _around(scan, x.float(), *parameters, out_dtype=out_dtype or x.dtype)


def _nothing(x, *parameters, out_dtype=None, **_):
    return x.to(out_dtype or x.dtype)


def _projection_only(x, weight, *parameters, out_dtype=None, **_):
    x_dbl = project(x, weight.to(x.dtype))
    return (x + 0 * x_dbl[:, :1, 0]).to(out_dtype or x.dtype)  # so that training has its backward too


@contextmanager
def scanning_with(scan: Callable[..., Tensor]):
    """The model's operator replaced by `scan`."""
    before, dass.ss2d.ss2d_projected = dass.ss2d.ss2d_projected, scan
    try:
        yield
    finally:
        dass.ss2d.ss2d_projected = before


def quadratic_seconds(config: DASSConfig, batch: int, frames: int) -> float:
    """What a training step costs with the reference, about: the gradient of every slice is a tensor of the whole size."""
    seconds, length = 0.0, config.mel_bins // 4 * (frames // 4)
    for depth, width in zip(config.depths, config.dims, strict=True):
        seconds += 3.4e-9 * depth * batch * 4 * width * length**2
        length //= 4
    return seconds
