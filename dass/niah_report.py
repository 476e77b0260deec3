"""The report of a needle-in-a-haystack test: `report.html`, `results.csv` and `pictures/`, from what lies in its folder.

python -m dass.niah_report runs/niah
"""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

from dass.checkpoint import atomic_write, read_json
from dass.niah_page import build_page
from dass.niah_pictures import draw_cost, draw_decisions, draw_heat_maps, draw_retention, models_of, to_png
from dass.niah_store import Store, StoreError

COLUMNS = (
    *("model", "haystack", "snr", "length", "position", "status", "frames", "input_seconds", "clips", "broken"),
    *("classes", "map", "map_low", "map_high", "retention", "retention_low", "retention_high", "retention_of"),
    *("chance", "retention_chance", "top1_chance"),
    *("top1", "top1_low", "top1_high", "centred", "centred_low", "centred_high"),
    *("seconds", "seconds_worst", "peak_memory", "parameters", "model_id", "finished"),
    "error",
)


def write_report(folder: Path | str) -> Path:
    """Writes the report of what is in a results folder and returns the page. StoreError where there is nothing."""
    folder = Path(folder)
    store = Store(folder)
    order = {model: number for number, model in enumerate(models_of(store.lines.values()))}
    lines = sorted(
        store.lines.values(),
        key=lambda line: (
            order[line["model"]],
            line["haystack"],
            -(line["snr"] or 0),
            line["length"],
            line["position"],
        ),
    )
    if not lines:
        raise StoreError(f"{folder} holds no finished cell yet: nothing to report")
    pictures = {
        "retention": (to_png(draw_retention(lines)), "mAP as the input grows: what is kept of the order of the inputs"),
        "decisions": (to_png(draw_decisions(lines)), "Top-1 as the input grows: how often the decision is right"),
    }
    for model in order:
        caption = f"{model}: mAP over length and position; grey: not run, or failed as named"
        pictures[f"heat-{model}"] = to_png(draw_heat_maps(model, lines)), caption
    pictures["cost"] = to_png(draw_cost(lines)), "Cost of a pass, and where the trend leads at 2.5 hours"
    for name, (png, _) in pictures.items():
        safe = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
        atomic_write(folder / "pictures" / f"{safe}.png", png)
    environment = read_json(folder / "environment.json") if (folder / "environment.json").is_file() else {}
    atomic_write(folder / "results.csv", to_csv(lines))
    return atomic_write(folder / "report.html", build_page(lines, pictures, environment, store.protocol))


def to_csv(lines: list[dict]) -> str:
    """One row a cell; times in seconds, memory in bytes, mAP, top-1 and retention as fractions."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore", restval="")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in line.items()} for line in lines)
    return text.getvalue()


def main() -> int:
    """The command line: the folder of a test."""
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: python -m dass.niah_report FOLDER", file=sys.stderr)
        return 2
    try:
        print(write_report(sys.argv[1]))
    except StoreError as error:
        print(f"dass.niah_report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
