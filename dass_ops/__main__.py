"""`python -m dass_ops`: what was built, what can run here and why not, and a self-check of each backend."""

import sys
import time

import torch

from . import build_info, ss2d_projected
from .backends import Backend
from .info import backend_table, choice


def self_check(backend: Backend, device: str) -> float:
    """Runs ss2d_projected forward and backward on a small ragged map; the largest relative error against float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    channels, rank, state = 5, 2, 1
    inputs = [
        normal(1, channels, 3, 7),
        normal(4, rank + 2 * state, channels, scale=channels**-0.5),
        normal(4, channels, rank, scale=0.5),
        normal(4, channels, scale=0.5) - 2,
        normal(4 * channels, state, scale=0.3),
        normal(4 * channels),
    ]

    def run(dtype, where, name):
        leaves = [t.detach().to(where, dtype).requires_grad_() for t in inputs]
        y = ss2d_projected(*leaves, backend=name)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    expected = run(torch.float64, "cpu", Backend.REFERENCE)
    got = run(torch.float32, device, backend)
    return max(float((g.cpu().double() - e).abs().max() / e.abs().max()) for g, e in zip(got, expected, strict=True))


def main() -> int:
    info = build_info()
    print(f"dass_ops, built for torch {info['torch'] or '-'}; running torch {info['torch_running']}")
    print(f"  CPU   {info['machine'] or 'not built'}; in use: {info['cpu_instruction_set'] or '-'}")
    cuda = info["cuda_architectures"] and f"CUDA {info['cuda']}, architectures {info['cuda_architectures']}"
    print(f"  CUDA  {cuda or 'not built: ' + str(info['no_cuda'] or 'nothing was compiled')}")
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        print(f"  {device + ' tensors':<12} run on: {choice(device)}")
    failed = 0
    for backend, device, available, reason in backend_table():
        if not available:
            print(f"  {backend.value:<10} cannot run: {reason}")
            continue
        start = time.perf_counter()
        try:
            error = self_check(backend, device)
            good = error < 1e-4
            result = f"relative error {error:.1e}"
        except Exception as problem:
            good, result = False, f"{type(problem).__name__}: {str(problem).splitlines()[0]}"
        failed += not good
        seconds = time.perf_counter() - start
        print(f"  {backend.value:<10} {'ok' if good else 'WRONG':<6} on {device}: {result}, {seconds:.2f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
