"""The benchmarks run, check what they time, and write what they promise to write. Nothing here looks at a time."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts are run from there, not installed

import implementations  # noqa: E402
import model_throughput  # noqa: E402
import oracle  # noqa: E402
import peers  # noqa: E402
import scan_throughput  # noqa: E402
from implementations import OWN, PEER, REPLACED, own_scan, scan_flags  # noqa: E402
from model_scans import LOOP, NOTHING, scanning_with, scans  # noqa: E402
from problems import OPS, SHAPES, TINY, Problem, floor_seconds, multiply_add_slots  # noqa: E402
from session import Case, Session  # noqa: E402
from targets import targets  # noqa: E402
from timing import WARMING, Candidate, Clock, Sample, Statistics, peak_memory, round_robin, saved_for_backward  # noqa: E402

import dass_ops  # noqa: E402

pytestmark = pytest.mark.skipif("cpu" not in dass_ops.available_backends("cpu"), reason="dass_ops is not built")
FLAGS = [(False, False), (False, True), (True, True)]


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# -- the scripts -------------------------------------------------------------------------------------------------------


def test_scan_throughput_measures_what_it_was_asked_and_writes_it(tmp_path):
    chosen = ["--op", "selective_scan", "ss2d_projected", "--peers", "hoisted loop", "--ragged"]
    shown = run(
        *("scan_throughput.py", "--quick", "--threads", "1", *chosen),
        *("--json", str(tmp_path / "scan.json"), "--plot", str(tmp_path / "scan.png")),
    )
    result = json.loads((tmp_path / "scan.json").read_text())
    rows = [r for g in result["groups"] for r in g["rows"]]
    assert result["finished"] and result["machine"]["torch"] == torch.__version__ and result["machine"]["processor"]
    assert (tmp_path / "scan.png").stat().st_size > 10_000
    assert {r["implementation"] for r in rows if r["kind"] == PEER} == {"hoisted loop"}
    assert {r["op"] for r in rows} == {"selective_scan", "ss2d_projected"}
    ours = [r for r in rows if r["implementation"] == "dass_ops cpu"]
    assert {(r["op"], r["pass"], r["ragged"]) for r in ours} == {
        (op, name, ragged)
        for op in ("selective_scan", "ss2d_projected")
        for name in ("forward", "forward+backward")
        for ragged in (False, True)
    }
    for r in rows:
        assert r["status"] == "measured", r
        assert r["seconds"]["p10"] <= r["seconds"]["median"] <= r["seconds"]["p90"]
        assert r["elements_per_second"] == pytest.approx(r["elements"] / r["seconds"]["median"])
    for r in ours:
        assert r["error"] < 1e-5 and r["copy_fraction"] > 0 and r["floor"]["floor_s"] > 0
        assert r["peak_bytes"] is not None and r["tensor_bytes"] > 0
        assert r["op"] != "selective_scan" or (r["saved_bytes"] or 0) <= r["all_states_bytes"] / 60
    assert "Gel/s" in shown and "dass_ops cpu" in shown


def test_model_throughput_times_every_scan_and_splits_the_time(tmp_path):
    options = model_throughput.Options(quick=True, threads=1, device="cpu", json=tmp_path / "model.json")
    model_throughput.run(options.resolved(), Console())
    result = json.loads((tmp_path / "model.json").read_text())
    found = {(r["scan"], r["pass"]): r for r in result["rows"]}
    for scan in ("dass_ops cpu", "unfused cpu", "dass_ops reference", LOOP, NOTHING):
        for name in ("eval", "training"):
            assert found[scan, name]["status"] == "measured", found[scan, name]
            assert found[scan, name]["clips_per_second"] > 0
    split = result["splits"][0]["seconds"]
    assert {"scan", "scan's projection", "MLP", "norms", "depthwise convolutions", "other"} <= set(split)
    assert sum(split.values()) > 0 and all(v >= 0 for v in split.values())
    assert any("ss2d" in name for name in result["operators"][0]["seconds"])
    assert result["targets"][0]["target"] == 1.1


def test_the_scripts_say_what_can_be_asked_of_them():
    assert "--full" in run("model_throughput.py", "--help")


def test_a_peer_that_is_not_here_is_refused_by_name():
    options = scan_throughput.Options(quick=True, peers=("mamba_ssm",), device="cpu")
    with pytest.raises(SystemExit, match="mamba_ssm cannot be measured on cpu: runs on cuda only."):
        scan_throughput.run(options.resolved(), Console())


# -- checking before timing --------------------------------------------------------------------------------------------


def session() -> Session:
    return Session("cpu", cold=False, threads=1, limit=60.0)


@pytest.mark.parametrize("training", [False, True])
def test_a_short_call_is_told_from_what_is_measured_around_it(training, monkeypatch):
    """Short calls find their code in the caches, whatever taking their memory has taken."""

    def slow_peak_memory(call, device):
        time.sleep(0.05)
        return call(), 0

    import session as module

    monkeypatch.setattr(module, "peak_memory", slow_peak_memory)
    bench = module.Bench("cpu", cold=True, threads=1)
    problem = Problem("selective_scan", TINY)
    expected = oracle.expect(problem, *bench.inputs(problem))
    case = Case(problem, "dass_ops cpu", training)
    row = bench.prepare(case, expected)
    call, code = bench._calls[case]
    assert row.status == "measured" and 0 < row.first_seconds < module.SHORT
    assert callable(call) and callable(code)


@pytest.mark.parametrize("cold", [False, True])
def test_what_a_timed_call_finds_in_the_caches(cold, monkeypatch):
    """Warm: what calls like it, for some time, have left there. Cold: the code alone, which one call brings back."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) * 0.4 * WARMING)
    calls = []
    sample = Clock("cpu", cold=cold).once(lambda: calls.append("timed"), lambda: calls.append("before"))
    assert calls == (["before"] if cold else ["before"] * 3) + ["timed"]
    assert sample.seconds == pytest.approx(0.4 * WARMING)


def test_a_peer_that_memory_would_not_hold_is_left_out(monkeypatch):
    import session as module

    monkeypatch.setattr(module, "memory", lambda: 1000)
    rows = session().run([Case(Problem("selective_scan", TINY), n) for n in ("hoisted loop", "dass_ops cpu")], 0.1)
    assert [r.status for r in rows] == ["skipped", "measured"]
    assert "GB are there" in rows[0].reason


def wrong(scale: float, where: str):
    """The hoisted loop with an error."""

    def scan(u, delta, A, B, C, D, delta_bias):
        if where == "gradient":
            u = u + (scale - 1) * (u - u.detach())
        out = peers.hoisted_loop(u, delta, A, B, C, D, delta_bias)
        return out * scale if where == "output" else out

    return peers.Peer(f"wrong {where}", "", ("cpu",), lambda problem, flags: scan)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("where", ["output", "gradient"])
def test_a_peer_that_computes_something_else_is_rejected_and_not_timed(op, where):
    runs = session()
    peer = implementations.of_peer(wrong(1.01, where))
    runs.bench.known[peer.name] = peer
    rows = runs.run([Case(Problem(op, TINY), name, training=True) for name in (peer.name, "hoisted loop")], 0.05)
    assert [r.status for r in rows] == ["rejected", "measured"]
    assert ("the output" if where == "output" else "the gradient of") in rows[0].reason
    assert "off by 1.0e-02 of its largest value; allowed is 1e-03" in rows[0].reason or where == "gradient"
    assert rows[0].statistics is None and rows[1].statistics.count >= 3


def test_a_peer_that_answers_nan_or_another_shape_is_rejected():
    problem = Problem("selective_scan", TINY)
    expected = oracle.expect(problem, problem.inputs("cpu"))
    for out, complaint in (
        (torch.full((1, 16, 64), float("nan")), "off by nan"),
        (torch.zeros(1, 16, 32), "has shape"),
    ):
        with pytest.raises(oracle.Mismatch, match=complaint):
            expected.check(out)


def test_a_peer_that_raises_leaves_the_others_alone():
    runs = session()

    def raises(problem, flags):
        raise ImportError("its kernels were built for another torch")

    peer = implementations.of_peer(peers.Peer("broken", "", ("cpu",), raises))
    runs.bench.known[peer.name] = peer
    rows = runs.run([Case(Problem("selective_scan", TINY), name) for name in ("broken", "plain loop")], 0.05)
    assert [r.status for r in rows] == ["failed", "measured"]
    assert rows[0].reason == "ImportError: its kernels were built for another torch"


VARIANTS = [
    Problem(op, TINY, batch=2, **changes)
    for op in OPS
    for changes in (
        *({}, {"ragged": True}, {"dtype": "bfloat16"}),
        *({"reverse": "none"}, {"reverse": "all"}, {"channels_last": True}),
    )
]


@pytest.mark.parametrize("problem", [p for p in VARIANTS if not p.unsupported], ids=str)
def test_everything_here_agrees_with_the_oracle(problem):
    inputs, d_out = problem.inputs("cpu"), problem.d_out("cpu")
    expected = oracle.expect(problem, inputs, d_out)
    known, _ = implementations.registry("cpu")
    for name, i in known.items():
        if i.kind in (OWN, REPLACED, PEER) and not i.compiles and name not in ("dass_ops triton", "dass_ops emulated"):
            if not i.refuses(problem, True):
                expected.check(*i.bind(problem, inputs, expected.masked(d_out), True)())


def test_the_oracle_is_the_reference_itself():
    problem = Problem("ss2d_projected", TINY)
    inputs = {name: t.double() for name, t in problem.inputs("cpu").items()}
    expected = oracle.expect(problem, inputs)
    out = dass_ops.ss2d_projected(*inputs.values(), backend="reference")
    torch.testing.assert_close(out[0, expected.channels], expected.out)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["tiny", "mamba"])
def test_the_compiled_peer_agrees_with_the_oracle(shape):
    layer = SHAPES[shape]
    problem = Problem("selective_scan", layer if shape == "tiny" else type(layer)("mamba", 8, 64, 4, 1))
    inputs, d_out = problem.inputs("cpu"), problem.d_out("cpu")
    expected = oracle.expect(problem, inputs, d_out)
    compiled = implementations.registry("cpu")[0]["compiled"]
    expected.check(*compiled.bind(problem, inputs, expected.masked(d_out), True)())


def test_the_models_scans_are_the_same_model():
    from dass.model import DASS, DASSConfig

    torch.manual_seed(0)
    model = DASS(DASSConfig.tiny(num_classes=4)).eval()
    fbank = torch.randn(1, 32, 128)
    found = {}
    for name, scan in scans(torch.device("cpu")).items():
        with scanning_with(scan), torch.no_grad():
            found[name] = model(fbank)
    for name in ("unfused cpu", "dass_ops reference", LOOP):
        torch.testing.assert_close(found[name], found["dass_ops cpu"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[NOTHING], found["dass_ops cpu"], rtol=1e-4, atol=1e-5)


# -- figures -----------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_samples():
    s = Statistics.of([Sample(float(i), i) for i in range(11, 0, -1)])
    assert (s.median, s.p10, s.p90, s.least, s.count, s.page_faults) == (6.0, 2.0, 10.0, 1.0, 11, 6)


def test_rounds_interleave_and_a_slow_candidate_gets_its_share_only():
    order, clock = [], [0.0]

    def candidate(name: str, seconds: float) -> Candidate:
        def once() -> Sample:
            order.append(name)
            clock[0] += seconds
            return Sample(seconds)

        return Candidate(name, once)

    quick, slow, slowest = candidate("quick", 0.01), candidate("slow", 0.5), candidate("slowest", 3.0)
    round_robin([quick, slow, slowest], 20.0, now=lambda: clock[0])
    assert order[:3] == ["quick", "slow", "slowest"]
    assert 2 <= len(slowest.samples) <= 3  # a third of 20 s
    assert 13 <= len(slow.samples) <= 25  # a third, and what the quick one leaves
    assert len(quick.samples) == 300
    where = [i for i, name in enumerate(order) if name == "slow"]
    assert where[len(where) // 2] > len(order) // 4  # spread over the whole time
    limited, late = candidate("limited", 0.01), candidate("late", 0.5)
    round_robin([limited], 1e9, most=7, now=lambda: clock[0])
    assert len(limited.samples) == 7
    round_robin([late], 0.1, now=lambda: clock[0])
    assert len(late.samples) == 3  # never fewer, unless a call is slow indeed


def test_bytes_and_elements_are_those_of_the_tensors():
    for op in OPS:
        for batch, dtype in ((1, "float32"), (3, "bfloat16")):
            problem = Problem(op, TINY, batch, dtype)
            inputs, d_out = problem.inputs("cpu"), problem.d_out("cpu")
            assert problem.tensor_bytes(False) == d_out.nbytes
            assert problem.tensor_bytes(True) == d_out.nbytes + sum(t.nbytes for t in inputs.values())
            assert problem.elements == batch * 16 * 64
    problem = Problem("selective_scan", SHAPES["stage1"])
    moved = problem.moved_bytes(False) / problem.elements
    assert moved == pytest.approx(12, rel=0.01)  # u, delta, out in float32; B and C are small
    floors = floor_seconds(problem, False, bytes_per_second=40e9, multiply_adds=115e9)
    assert floors["memory_s"] == pytest.approx(problem.elements * 12 / 40e9, rel=0.01)
    assert floors["arithmetic_s"] == pytest.approx(problem.elements * 18.5 / 115e9, rel=0.01)
    assert multiply_add_slots(problem, True) > 2 * multiply_add_slots(problem, False)


def test_gpu_floors_are_those_of_the_design():
    from machine import GpuRates
    from problems import gpu_floor_seconds

    h200 = GpuRates(multiply_adds=33.5e12, special=4.18e12, issue=128 * 132 * 1.98e9)
    expected = {"stage1": (97, 217), "stage2": (48, 108), "stage3": (24, 54), "stage4": (12, 27)}  # microseconds
    for name, (forward, backward) in expected.items():
        problem = Problem("ss2d_projected", SHAPES[name], 32, "bfloat16")
        floors = [gpu_floor_seconds(problem, t, bytes_per_second=4.3e12, rates=h200)["floor_s"] for t in (False, True)]
        assert floors[0] * 1e6 == pytest.approx(forward, abs=1)
        assert (floors[1] - floors[0]) * 1e6 == pytest.approx(backward, abs=1)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_sees_what_a_call_holds_and_frees():
    def call():
        held = torch.ones(20_000_000 // 4)  # 20 MB, freed at the end
        return (held * 2)[:1].clone()

    _, peak = peak_memory(call, "cpu")
    assert 39e6 < peak < 44e6


def test_kept_memory_counts_each_storage_once_and_no_inputs():
    x = torch.randn(1000, requires_grad=True)

    def call():
        y = x.exp()  # keeps y
        return (y * y.view(10, 100).view(1000)).sum()  # keeps y again, twice

    assert saved_for_backward(call, [x])[1] == 4000


def row(**changes: object) -> dict:
    plain = {
        "op": "selective_scan",
        "shape": "stage1",
        "batch": 1,
        "dtype": "float32",
        "ragged": False,
        "reverse": "shape",
    }
    plain |= {
        "channels_last": False,
        "pass": "forward",
        "implementation": "dass_ops cpu",
        "kind": "own",
        "environment": "",
    }
    plain |= {"threads": 0, "status": "measured", "saved_bytes": 10, "all_states_bytes": 1000, "ms": 1.0} | changes
    return plain | {"seconds": {"median": plain["ms"] / 1e3}, "elements_per_second": 1e6 / plain["ms"]}


def test_targets_compare_the_right_rows():
    rows = [
        row(),
        row(implementation="mambapy", kind="peer", ms=20.0),
        row(implementation="hoisted loop", kind="peer", ms=16.0),
        row(implementation="wrong", kind="peer", ms=0.1, status="rejected"),
        row(implementation="torch.exp", kind="yardstick", ms=1.25),
        row(ragged=True, ms=1.4),
        row(reverse="none", ms=1.0),
        row(reverse="all", ms=1.1),
        row(dtype="bfloat16", ms=0.9),
        row(environment="avx2", ms=2.0),
        row(op="ss2d", ms=0.5),
        row(op="ss2d", implementation="unfused cpu", kind="replaced", ms=1.0),
        row(**{"pass": "forward+backward", "ms": 3.0, "saved_bytes": 100}),
    ]
    found = {(t["name"], t["where"]): (round(t["value"], 3), t["reached"]) for t in targets(rows)}
    scan, fused = "selective_scan, stage1, batch 1, forward", "ss2d, stage1, batch 1, forward"
    assert found == {
        ("faster than the best peer", scan): (16.0, True),
        ("elements per second over torch.exp's", scan): (1.25, True),
        ("time for a ragged length", scan): (1.4, False),
        ("time for all backwards over all forwards", scan): (1.1, True),
        ("time in bfloat16 over float32", scan): (0.9, True),
        ("speed with AVX2 forced", scan): (0.5, True),
        ("faster than what it replaces", fused): (2.0, False),
        ("elements per second over the plain scan's", fused): (2.0, True),
        ("kept for the backward, of all states", scan + "+backward"): (0.1, False),
    }


def test_gpu_targets_add_up_the_whole_model():
    whole = {"op": "ss2d_projected", "batch": 32, "dtype": "bfloat16", "pass": "forward+backward"}
    rows = []
    for shape, ours in (("stage1", 1.0), ("stage2", 2.0), ("stage3", 0.5), ("stage4", 1.0)):
        rows.append(row(**whole, shape=shape, implementation="dass_ops cuda", ms=ours, floor={"floor_s": 0.75e-3}))
        rows.append(row(**whole, shape=shape, implementation="unfused cuda", kind="replaced", ms=9.0))
        rows.append(row(**whole, shape=shape, implementation="unfused vmamba", kind="peer", ms=5.0))
    forward = whole | {"pass": "forward", "shape": "stage1", "implementation": "dass_ops cuda"}
    rows.append(row(**forward, ms=0.5, floor={"floor_s": 0.25e-3}))
    found = {t["name"]: (t["value"], t["reached"]) for t in targets(rows)}
    assert found["faster than the unfused pipeline"] == (pytest.approx(14 * 5 / (2 + 4 + 4 + 2)), True)
    assert found["share of the estimated speed, forward"] == (pytest.approx(0.5), False)
    assert found["share of the estimated speed, backward"] == (pytest.approx(1.0), True)


@pytest.mark.slow
def test_the_compiled_pipeline_agrees_with_the_oracle():
    problem = Problem("ss2d_projected", TINY)
    inputs, d_out = problem.inputs("cpu"), problem.d_out("cpu")
    expected = oracle.expect(problem, inputs, d_out)
    pipeline = implementations.replaced("cpu", lambda p: own_scan("cpu", scan_flags(p)), compiled=True)
    expected.check(*pipeline.bind(problem, inputs, expected.masked(d_out), True)())


def test_another_process_takes_part_in_the_rounds():
    runs = session()
    try:
        rows = runs.run(
            [Case(Problem("selective_scan", TINY), "dass_ops cpu", environment=e) for e in ("", "scalar")], 0.1
        )
        assert [r.status for r in rows] == ["measured", "measured"]
        assert all(r.statistics.count >= 3 for r in rows)
    finally:
        runs.close()
