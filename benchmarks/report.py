"""From rows to JSON, tables on screen and pictures."""

from collections.abc import Sequence
from pathlib import Path

from implementations import COPY, OWN, PEER, YARDSTICK
from problems import FORWARD, TRAINING, floor_seconds, gpu_floor_seconds
from rich.console import Console
from rich.table import Table
from session import Row
from targets import PLAIN

from dass.checkpoint import atomic_write


def row_as_dict(row: Row, rows: Sequence[Row], *, multiply_adds: float | None, gpu, on_gpu: bool) -> dict:
    """Every figure of a row. `rows`: of the whole group, where the copy and the best peer are."""
    case, problem = row.case, row.case.problem
    found = problem.as_dict() | {
        "pass": TRAINING if case.training else FORWARD,
        "implementation": case.implementation,
        "kind": row.kind,
        "environment": case.environment,
        "threads": case.threads,
        "status": row.status,
        "reason": row.reason,
    }
    if row.statistics is None:
        return found
    elements, moved = problem.elements, problem.moved_bytes(case.training)
    if case.implementation.startswith("torch."):  # one tensor of u's size
        elements, moved = problem.elements // problem.shape.state, None
    median = row.statistics.median
    found |= {
        "seconds": {k: v for k, v in row.statistics.as_dict().items() if k != "page_faults"},
        "elements": elements,
        "elements_per_second": elements / median,
        "bytes": moved,
        "bytes_per_second": moved / median if moved else None,
        "page_faults": row.statistics.page_faults,
        "error": row.error,
        "peak_bytes": row.peak_bytes,
        "tensor_bytes": problem.tensor_bytes(case.training),
        "saved_bytes": row.saved_bytes,
        "instruction_set": row.instruction_set,
        "all_states_bytes": problem.state_bytes(),
    }
    if (copied := copy_rate(row, rows)) and moved:
        floors = (
            gpu_floor_seconds(problem, case.training, bytes_per_second=copied, rates=gpu)
            if on_gpu
            else floor_seconds(problem, case.training, bytes_per_second=copied, multiply_adds=multiply_adds)
        )
        found |= {
            "copy_fraction": moved / median / copied,
            "floor": floors,
            "floor_fraction": floors["floor_s"] / median,
        }
    return found


def copy_rate(row: Row, rows: Sequence[Row]) -> float | None:
    """Bytes per second of the group's copy of the same operator and pass, else of any."""
    copies = [r for r in rows if r.case.implementation == COPY and r.statistics]

    def closeness(r: Row) -> tuple[bool, bool]:
        return r.case.problem.op == row.case.problem.op, r.case.training == row.case.training

    if not copies:
        return None
    best = max(copies, key=closeness)
    return best.case.problem.moved_bytes(best.case.training) / best.statistics.median


# -- on screen ---------------------------------------------------------------------------------------------------------


def print_group(console: Console, group: dict) -> None:
    """One table for each operator of a group, forward before forward+backward, fastest first."""
    for op in dict.fromkeys(r["op"] for r in group["rows"]):
        print_rows(console, f"{op}, {group['name']}", [r for r in group["rows"] if r["op"] == op])


COLUMNS = ("who", "ms", "p10-p90", "n", "Gel/s", "copy", "floor", "peer", "peak MB", "/tensors", "kept MB", "faults")
ONLY_WIDE = ("p10-p90", "n", "kept MB", "faults")
WIDE = 140  # characters, for all columns


def print_rows(console: Console, title: str, rows: list[dict]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    columns = COLUMNS if console.width >= WIDE else [c for c in COLUMNS if c not in ONLY_WIDE]
    for column in columns:
        table.add_column(column, justify="left" if column == "who" else "right", no_wrap=True)
    for name in (FORWARD, TRAINING):
        measured = sorted(
            (r for r in rows if r["pass"] == name and "seconds" in r), key=lambda r: r["seconds"]["median"]
        )
        if not measured:
            continue
        best = best_peer(measured)
        table.add_section()
        table.add_row(f"[bold]{name}[/bold]")
        for row in measured:
            cells = _cells(row, best)
            table.add_row(*(cells[c] for c in columns), style="bold green" if row["kind"] == OWN else "")
    console.print(table)
    reasons = dict.fromkeys(
        f"{label(r)}, {r['pass']}: {r['status']}: {r['reason']}" for r in rows if r["status"] != "measured"
    )
    for reason in reasons:
        console.print(f"  {reason}", style="red" if "rejected" in reason or "failed" in reason else "dim")


def label(row: dict) -> str:
    """The implementation and what is special about the row."""
    dtype = {"float32": "", "bfloat16": "bf16"}.get(row["dtype"], row["dtype"])
    special = [dtype] + ["ragged"] * row["ragged"]
    special += [{"none": "all forwards", "all": "all backwards"}.get(row["reverse"], "")]
    special += (
        ["channels last"] * row["channels_last"]
        + [row["environment"]]
        + [f"{row['threads']} threads"] * bool(row["threads"])
    )
    return ", ".join([row["implementation"], *filter(None, special)])


def best_peer(rows: Sequence[dict]) -> float | None:
    """The least median among the peers that are right and were given the same problem, in seconds."""
    times = [r["seconds"]["median"] for r in rows if r["kind"] == PEER and r["status"] == "measured"]
    return min(times, default=None)


def _cells(row: dict, best: float | None) -> dict[str, str]:
    """A row's cells by column. `best`: the fastest peer's seconds."""
    seconds, yardstick = row["seconds"], row["kind"] == YARDSTICK

    def ms(value: float) -> str:
        return f"{value * 1e3:.3g}" if value < 1 else f"{value * 1e3:.0f}"

    def mb(key: str) -> str:
        return "-" if yardstick or row[key] is None else f"{row[key] / 1e6:.1f}"

    def share(key: str) -> str:
        return "-" if row.get(key) is None else f"{row[key]:.0%}"

    same_problem = all(row[k] == PLAIN[k] for k in ("dtype", "ragged", "reverse", "channels_last"))
    against = best and row["kind"] == OWN and same_problem
    return {
        "who": "  " + label(row),
        "ms": ms(seconds["median"]),
        "p10-p90": f"{ms(seconds['p10'])}-{ms(seconds['p90'])}",
        "n": str(seconds["count"]),
        "Gel/s": "-" if row["implementation"] == COPY else f"{row['elements_per_second'] / 1e9:.3g}",
        "copy": share("copy_fraction"),
        "floor": "-" if yardstick else share("floor_fraction"),
        "peer": f"{best / seconds['median']:.1f}x" if against else "-",
        "peak MB": mb("peak_bytes"),
        "/tensors": "-" if yardstick or not row["peak_bytes"] else f"{row['peak_bytes'] / row['tensor_bytes']:.2f}",
        "kept MB": "-" if row["pass"] == FORWARD else mb("saved_bytes"),
        "faults": str(row["page_faults"]),
    }


def print_targets(console: Console, targets: Sequence[dict]) -> None:
    """A line for each promise: in how many places it was kept, and the worst of them."""
    if not targets:
        return
    table = Table(title="Targets", title_justify="left", title_style="bold", header_style="dim")
    for column in ("", "kept", "worst", "target", "aim", "where it is worst"):
        table.add_column(column, justify="right" if column in ("kept", "worst", "target", "aim") else "left")
    for name, target in dict.fromkeys((t["name"], t["target"]) for t in targets):
        same = [t for t in targets if (t["name"], t["target"]) == (name, target)]
        worst = min(same, key=lambda t: -t["value"] if t["at_most"] else t["value"])
        kept = sum(t["reached"] for t in same)
        table.add_row(
            name,
            f"{kept} of {len(same)}",
            f"{worst['value']:.3g}x",
            f"{'<=' if worst['at_most'] else '>='} {target:.3g}x",
            f"{worst['aim']:g}x" if worst["aim"] else "",
            worst["where"] + (f" ({worst['detail']})" if worst["detail"] else ""),
            style="green" if kept == len(same) else "red",
        )
    console.print(table)


# -- pictures ----------------------------------------------------------------------------------------------------------


def save_plot(result: dict, path: Path) -> None:
    """Elements per second of every implementation, one panel for each operator and pass, a group of bars for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for g in result["groups"] for r in g["rows"] if "seconds" in r and r["implementation"] != COPY]
    rows = [r for r in rows if all(r[k] == v for k, v in PLAIN.items() if k != "dtype")]
    panels = sorted({(r["op"], r["pass"]) for r in rows}, key=lambda p: (p[0], p[1] == TRAINING))
    if not panels:
        return
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(11, 3.4 * len(panels)), squeeze=False, layout="constrained")
    names = list(
        dict.fromkeys(label(r) for r in sorted(rows, key=lambda r: (r["kind"] != OWN, r["kind"] == YARDSTICK)))
    )
    colors = {name: pyplot.colormaps["tab20"](i % 20) for i, name in enumerate(names)}
    for axis, (op, name) in zip(axes[:, 0], panels, strict=True):
        here = [r for r in rows if (r["op"], r["pass"]) == (op, name)]
        places = list(dict.fromkeys((r["shape"], r["batch"]) for r in here))
        present = [n for n in names if any(label(r) == n for r in here)]
        width = 0.9 / max(1, len(present))
        for i, n in enumerate(present):
            of = {(r["shape"], r["batch"]): r["elements_per_second"] / 1e9 for r in here if label(r) == n}
            x = [places.index(p) + (i - (len(present) - 1) / 2) * width for p in of]
            axis.bar(x, list(of.values()), width, label=n, color=colors[n])
        axis.set_yscale("log")
        axis.set_xticks(range(len(places)), [f"{s}, batch {b}" for s, b in places])
        axis.set_ylabel("1e9 state updates a second")
        axis.set_title(f"{op}, {name}", loc="left")
        axis.legend(fontsize=7, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        axis.grid(axis="y", alpha=0.3)
    machine = result["machine"]
    figure.suptitle(f"{machine.get('gpu') or machine['processor']}, {machine['threads']} threads", fontsize=9)
    atomic_write(path, lambda temporary: figure.savefig(temporary, dpi=110))
    pyplot.close(figure)
