"""The operators of dass_ops in Triton: for GPUs without a CUDA compiler at hand, and interpreted on the CPU for tests.

Four functions with the signatures of csrc/schema.cpp. This package knows torch and triton and nothing else.
"""

from .backward import scan_backward
from .forward import scan_forward
from .map_backward import ss2d_backward
from .map_forward import ss2d_forward

__all__ = ["scan_backward", "scan_forward", "ss2d_backward", "ss2d_forward"]
