"""What this package promises of its speed, and what a run's rows say about it."""

from collections.abc import Callable, Sequence

from problems import FORWARD, TRAINING

OURS = "dass_ops cpu"
STAGES = ("stage1", "stage2", "stage3", "stage4")
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
    """Every promise that the rows bear on, worst place first within each: name, where, value, target, aim (or None), at_most
    (whether smaller is better) and reached. Values are ratios of medians of one group of rows."""
    timed = [r for r in rows if r["status"] == "measured" and "seconds" in r and r["shape"] != "tiny"]
    cpu = [r for r in timed if r["implementation"] in (OURS, "unfused cpu") or r["kind"] in ("peer", "yardstick")]
    found = []
    for check in (_peers, _exp, _ragged, _reverse, _fused, _instruction_sets, _bfloat16, _saved):
        found += check(Table(cpu))
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


def _entry(name: str, row: dict, value: float, target: float, aim: float | None = None, at_most: bool = False) -> dict:
    where = f"{row['op']}, {row['shape']}, batch {row['batch']}, {row['pass']}"
    reached = value <= target if at_most else value >= target
    return {
        **{"name": name, "where": where, "value": value, "target": target, "aim": aim},
        **{"at_most": at_most, "reached": reached},
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
        name = f"faster than the best peer ({best['implementation']})"
        found.append(_entry(name, row, _median(best) / _median(row), target, aim))
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
