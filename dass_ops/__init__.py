"""The bidirectional selective scan and its map form SS2D, on CPU and GPU, differentiable and deterministic.

    >>> from dass_ops import selective_scan
    >>> out = selective_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)

The maths: SCAN.md in this folder. What was built and what can run here: `python -m dass_ops`.
"""

from . import loading
from .backends import Backend, available_backends, default_backend
from .functional import bidirectional_scan, selective_scan, selective_scan_fn, ss2d, ss2d_projected
from .info import build_info
from .registration import ensure

if not loading.problem("_C"):
    ensure("")  # so that saved and compiled programs find the operators
del ensure, loading

__all__ = [
    "Backend",
    "available_backends",
    "bidirectional_scan",
    "build_info",
    "default_backend",
    "selective_scan",
    "selective_scan_fn",
    "ss2d",
    "ss2d_projected",
]
