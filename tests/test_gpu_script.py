"""benchmarks/gpu.py runs to its end everywhere, and what it writes is what happened."""

import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import build_peers  # noqa: E402
import gpu  # noqa: E402


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "FOLDER", tmp_path)
    return tmp_path


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the script would use it")
def test_without_a_gpu_every_stage_says_why(tmp_path):
    target = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(target.read_text())
    assert result["finished"] and list(result["stages"]) == [s.name for s in gpu.STAGES]
    for stage in result["stages"].values():
        assert stage["status"] == "skipped" and "no CUDA device is visible" in stage["reason"]
    assert result["machine"]["versions"]["torch"] == torch.__version__
    assert result["machine"]["commit"] or not (ROOT / ".git").exists()


def test_limits_fit_ten_minutes_but_for_what_is_skipped():
    assert {s.name for s in gpu.STAGES} >= {"build", "cuda", "triton", "memcheck", "racecheck", "mamba", "model"}
    assert all(s.limit <= 150 for s in gpu.STAGES)


def stage(name, run, **options):
    return gpu.Stage(name, name, options.pop("limit", 20), run, needs_gpu=False)


def test_results_are_written_stage_by_stage_and_merged(folder):
    target = folder / "out.json"
    seen = []

    def good(run):
        seen.append(run.name)
        return gpu.Outcome("ok", details={"figure": 7})

    def bad(run):
        assert json.loads(target.read_text())["stages"]["good"]["status"] == "ok"  # already there
        status, code = run.command([sys.executable, "-c", "print('what happened'); raise SystemExit(3)"])
        return gpu.Outcome(status, run.log_end(), {"code": code})

    stages = [stage("good", good), stage("bad", bad)]
    assert gpu.main(["--json", str(target)], stages) == 1
    result = json.loads(target.read_text())["stages"]
    assert (
        result["bad"]["status"] == "failed"
        and result["bad"]["code"] == 3
        and "what happened" in result["bad"]["reason"]
    )
    assert gpu.main(["--json", str(target), "--stage", "good"], stages) == 1  # the other stage's result stays
    assert list(json.loads(target.read_text())["stages"]) == ["good", "bad"] and seen == ["good", "good"]


def test_a_stage_is_stopped_at_its_limit_with_all_its_processes(folder):
    sleep = "import time; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleep!r}]); {sleep}"

    def slow(run):
        return gpu.Outcome(run.command([sys.executable, "-c", code])[0])

    begin = time.monotonic()
    assert gpu.main(["--json", str(folder / "out.json")], [stage("slow", slow, limit=2)]) == 1
    assert time.monotonic() - begin < 20
    assert json.loads((folder / "out.json").read_text())["stages"]["slow"]["status"] == "stopped"


def test_stages_beyond_the_minutes_are_skipped(folder):
    gpu.main(["--json", str(folder / "out.json"), "--minutes", "0"], [stage("late", lambda run: gpu.Outcome("ok"))])
    late = json.loads((folder / "out.json").read_text())["stages"]["late"]
    assert late["status"] == "skipped" and "--stage late" in late["reason"]


def test_outcomes_of_tests_are_recorded_one_by_one(folder):
    (folder / "test_some.py").write_text(
        "import pytest, time\ndef test_cuda_good(): pass\ndef test_cuda_bad(): assert 1 == 2\n"
        "def test_cuda_skipped(): pytest.skip('no reason')\ndef test_cuda_slow(): time.sleep(600)\ndef test_other(): pass\n"
    )
    run = gpu.tests("cuda", str(folder / "test_some.py"), workers=0)
    outcome = run(gpu.Run("9.0", 20, "cuda"))  # seconds: time for a busy machine to come to the slow test
    assert outcome.status == "stopped" and outcome.details["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    good, bad, skipped = outcome.details["tests"]
    assert good["test"].endswith("test_cuda_good") and "1 == 2" in bad["message"] and "no reason" in skipped["message"]


def test_sources_of_peers_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(build_peers, "FOLDER", tmp_path / "peers")
    mamba = tmp_path / "mamba_ssm-1.0" / "csrc" / "selective_scan"
    oflex = tmp_path / "VMamba" / "kernels" / "selective_scan" / "csrc" / "selective_scan" / "cusoflex"
    for where in (mamba, oflex):
        where.mkdir(parents=True)
        for name in ("selective_scan.cpp", "kernel.cu", "kernel.cuh"):
            (where / name).touch()
    with tarfile.open(tmp_path / "mamba_ssm-1.0.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "mamba_ssm-1.0", "mamba_ssm-1.0")
    module, sources, _ = build_peers.plan(tmp_path / "mamba_ssm-1.0.tar.gz")
    assert module == "selective_scan_cuda" and [s.name for s in sources] == ["selective_scan.cpp", "kernel.cu"]
    module, sources, _ = build_peers.plan(tmp_path / "VMamba")
    assert module == "selective_scan_cuda_oflex" and [s.name for s in sources] == ["kernel.cu", "selective_scan.cpp"]
    with pytest.raises(SystemExit, match="neither mamba_ssm's nor VMamba's"):
        build_peers.plan(tmp_path)
