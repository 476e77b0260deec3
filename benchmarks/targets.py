"""What this package promises of its speed, and what a run's rows say about it."""

from collections.abc import Callable, Sequence

from problems import FORWARD, TRAINING

OURS, OURS_GPU = "dass_ops cpu", "dass_ops cuda"
DEPTHS = dict(zip(("stage1", "stage2", "stage3", "stage4"), (2, 2, 8, 2), strict=True))  # of DASS-small
STAGES = tuple(DEPTHS)
# What is so of a row unless asked for otherwise.
PLAIN = {
    "ragged": False,
    "reverse": "shape",
    "channels_last": False,
    "environment": "",
    "threads": 0,
    "dtype": "float32",
}


def targets(rows: Sequence[dict]) -> list[dict]:
    """Every promise that the rows bear on: name, where, value, target, aim (or None), at_most (whether smaller is better),
    reached and detail. Values are ratios of medians of one group of rows."""
    timed = Table([r for r in rows if r["status"] == "measured" and "seconds" in r and r["shape"] != "tiny"])
    on_cpu = (_peers, _exp, _ragged, _reverse, _fused, _instruction_sets, _bfloat16, _saved)
    on_gpu = (_gpu_floor, _gpu_pipeline, _gpu_mamba)
    found = []
    for check in on_gpu if any(r["implementation"] == OURS_GPU for r in timed.rows) else on_cpu:
        found += check(timed)
    return found


class Table:
    """Rows by what they are of."""

    def __init__(self, rows: Sequence[dict]):
        self.rows = rows

    def all(self, **conditions: object) -> list[dict]:
        wanted = PLAIN | conditions
        return [r for r in self.rows if all(r[k] == v for k, v in wanted.items())]

    def one(self, **conditions: object) -> dict | None:
        return next(iter(self.all(**conditions)), None)

    def like(self, row: dict, **changes: object) -> dict | None:
        """The same row but for `changes`."""
        keys = ("op", "shape", "batch", "pass", "implementation", *PLAIN)
        return self.one(**({k: row[k] for k in keys} | changes))


def _entry(
    name: str, row: dict, value: float, target: float, aim=None, at_most: bool = False, detail: str = ""
) -> dict:
    where = f"{row['op']}, {row['shape']}, batch {row['batch']}, {row['pass']}"
    reached = value <= target if at_most else value >= target
    return {
        **{"name": name, "where": where, "value": value, "target": target, "aim": aim},
        **{"at_most": at_most, "reached": reached, "detail": detail},
    }


def _median(row: dict) -> float:
    return row["seconds"]["median"]


def _time_per_element(row: dict) -> float:
    return 1 / row["elements_per_second"]


def _peers(table: Table) -> list[dict]:
    """Speed-up over the fastest peer that computes the same."""
    found = []
    for row in table.all(op="selective_scan", implementation=OURS):
        same = {key: row[key] for key in ("op", "shape", "batch", "pass")}
        peers = table.all(kind="peer", **same)
        if not peers:
            continue
        if row["shape"] == "mamba":
            target, aim = {FORWARD: (60, 100), TRAINING: (30, None)}[row["pass"]]
        elif row["shape"] in STAGES:
            forward = (15 if row["shape"] == "stage1" else 8, None)
            target, aim = {FORWARD: forward, TRAINING: (15, 20)}[row["pass"]]
        else:
            continue
        best = min(peers, key=_median)
        value = _median(best) / _median(row)
        found.append(_entry("faster than the best peer", row, value, target, aim, detail=best["implementation"]))
    return found


def _ratio(
    table: Table, name: str, value: Callable[[dict], tuple[float, float, float | None, bool] | None], **conditions
):
    found = []
    for row in table.all(implementation=OURS, **conditions):
        if (made := value(row)) is not None:
            number, target, aim, at_most = made
            found.append(_entry(name, row, number, target, aim, at_most))
    return found


def _exp(table: Table) -> list[dict]:
    def value(row: dict):
        other = table.like(row, implementation="torch.exp")
        if other is None or row["shape"] not in STAGES:
            return None
        return row["elements_per_second"] / other["elements_per_second"], 1.0, 1.3, False

    return _ratio(table, "elements per second over torch.exp's", value, op="selective_scan", **{"pass": FORWARD})


def _ragged(table: Table) -> list[dict]:
    def value(row: dict):
        other = table.like(row, ragged=False)
        return (_time_per_element(row) / _time_per_element(other), 1.3, None, True) if other else None

    return [
        e
        for op in ("selective_scan", "ss2d")
        for e in _ratio(table, "time for a ragged length", value, op=op, ragged=True)
    ]


def _reverse(table: Table) -> list[dict]:
    def value(row: dict):
        other = table.like(row, reverse="none")
        return (_median(row) / _median(other), 1.15, None, True) if other else None

    return _ratio(table, "time for all backwards over all forwards", value, op="selective_scan", reverse="all")


def _fused(table: Table) -> list[dict]:
    def against_pipeline(row: dict):
        other = table.like(row, implementation="unfused cpu")
        return (_median(other) / _median(row), 3.0, None, False) if other else None

    def against_scan(row: dict):
        other = table.like(row, op="selective_scan")
        if other is None or row["shape"] not in ("stage1", "stage2"):
            return None
        return row["elements_per_second"] / other["elements_per_second"], 1.2, None, False

    found = _ratio(table, "faster than what it replaces", against_pipeline, op="ss2d")
    return found + _ratio(table, "elements per second over the plain scan's", against_scan, op="ss2d")


def _instruction_sets(table: Table) -> list[dict]:
    def value(row: dict):
        other = table.like(row, environment="")
        return (_median(other) / _median(row), 0.4, None, False) if other else None

    ops = ("selective_scan", "ss2d")
    return [e for op in ops for e in _ratio(table, "speed with AVX2 forced", value, op=op, environment="avx2")]


def _bfloat16(table: Table) -> list[dict]:
    def value(row: dict):
        other = table.like(row, dtype="float32")
        return (_median(row) / _median(other), 1.0, None, True) if other else None

    ops = ("selective_scan", "ss2d")
    return [e for op in ops for e in _ratio(table, "time in bfloat16 over float32", value, op=op, dtype="bfloat16")]


def _saved(table: Table) -> list[dict]:
    """What a forward keeps for its backward, as a share of all states."""

    def value(row: dict):
        if row["saved_bytes"] is None:
            return None
        return row["saved_bytes"] / row["all_states_bytes"], 1 / 64, None, True

    name, training = "kept for the backward, of all states", {"pass": TRAINING}
    return [e for op in ("selective_scan", "ss2d") for e in _ratio(table, name, value, op=op, **training)]


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def _gpu_floor(table: Table) -> list[dict]:
    """The fused map at batch 32 in bfloat16: the share reached of the speed that memory, special functions and instruction
    issue allow; the backward is the difference of the two passes."""
    found = []
    for forward in table.all(
        op="ss2d_projected", implementation=OURS_GPU, batch=32, dtype="bfloat16", **{"pass": FORWARD}
    ):
        both = table.like(forward, **{"pass": TRAINING})
        if "floor" not in forward or both is None:
            continue
        floor = forward["floor"]["floor_s"], both["floor"]["floor_s"] - forward["floor"]["floor_s"]
        time = _median(forward), _median(both) - _median(forward)
        found.append(_entry("share of the estimated speed, forward", forward, floor[0] / time[0], 0.6))
        found.append(_entry("share of the estimated speed, backward", both, floor[1] / time[1], 0.5))
    return found


def _gpu_pipeline(table: Table) -> list[dict]:
    """All maps of DASS-small, forward and backward, against the fastest of the unfused pipelines on each."""
    found = []
    for dtype in ("float32", "bfloat16"):
        ours = others = 0.0
        rows = table.all(op="ss2d_projected", implementation=OURS_GPU, batch=32, dtype=dtype, **{"pass": TRAINING})
        for row in rows:
            same = {key: row[key] for key in ("op", "shape", "batch", "pass", "dtype")}
            pipelines = [r for r in table.all(**same) if r["kind"] in ("replaced", "peer")]
            if row["shape"] not in DEPTHS or not pipelines:
                break
            ours += DEPTHS[row["shape"]] * _median(row)
            others += DEPTHS[row["shape"]] * min(map(_median, pipelines))
        else:
            if len(rows) == len(DEPTHS):
                place = rows[0] | {"shape": f"DASS-small, {dtype}"}
                found.append(_entry("faster than the unfused pipeline", place, others / ours, 4.0))
    return found


def _gpu_mamba(table: Table) -> list[dict]:
    found = []
    for dtype in ("float32", "bfloat16"):
        for row in table.all(op="selective_scan", shape="mamba", implementation=OURS_GPU, dtype=dtype):
            if (other := table.like(row, implementation="mamba_ssm")) is not None:
                found.append(_entry(f"faster than mamba_ssm, {dtype}", row, _median(other) / _median(row), 1.3))
    return found
