"""The page of a needle-in-a-haystack test: one HTML file with pictures, table, configuration and machine inside it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape

from dass.haystack import DESCRIPTIONS
from dass.niah_measure import describe_length
from dass.niah_pictures import PUBLISHED, Panel, chance_points, curve_points, failures, models_of, panels_of
from dass.niah_store import OK

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2430; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.note { color: #5a6472; } figure { margin: 1rem 0; } figcaption { color: #5a6472; font-size: .88rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .6rem; text-align: right; border-bottom: 1px solid #e2e5ea; white-space: nowrap; }
th { background: #f4f6f8; position: sticky; top: 0; } th.sort { cursor: pointer; }
th.sort::after { content: " \\2195"; color: #aab2bd; } td.text, th.text { text-align: left; }
tr.failed td { color: #a02020; } td.why { white-space: normal; text-align: left; max-width: 22rem; }
.scroll { overflow: auto; max-height: 34rem; border: 1px solid #e2e5ea; }
pre { background: #f4f6f8; padding: .8rem; overflow: auto; font-size: .82rem; }
input { font: inherit; padding: .25rem .5rem; margin: .4rem 0; width: 18rem; }
"""

SCRIPT = """
const table = document.getElementById("cells"), body = table.tBodies[0];
const value = (row, column) => row.cells[column].dataset.v ?? row.cells[column].textContent;
table.querySelectorAll("th.sort").forEach((head, column) => head.addEventListener("click", () => {
  const down = head.dataset.down = head.dataset.down === "1" ? "" : "1";
  const rows = [...body.rows].sort((one, other) => {
    const a = value(one, column), b = value(other, column), x = parseFloat(a), y = parseFloat(b);
    const order = isNaN(x) || isNaN(y) ? a.localeCompare(b) : x - y;
    return down ? -order : order;
  });
  body.append(...rows);
}));
document.getElementById("filter").addEventListener("input", event => {
  const words = event.target.value.toLowerCase().split(/\\s+/);
  for (const row of body.rows)
    row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
});
"""

COLUMNS = (  # title, key, how it is written, whether it is text
    ("model", "model", str, True),
    ("haystack", "haystack", str, True),
    ("SNR [dB]", "snr", lambda v: f"{v:g}", False),
    ("length", "length", describe_length, False),
    ("position", "position", lambda v: f"{v:g}", False),
    ("mAP [%]", "map", lambda v: f"{100 * v:.1f}", False),
    ("95 % interval", "map_low", None, False),
    ("by chance [%]", "chance", lambda v: f"{100 * v:.1f}", False),
    ("kept [%]", "retention", lambda v: f"{100 * v:.1f}", False),
    ("95 % interval", "retention_low", None, False),
    ("top-1 [%]", "top1", lambda v: f"{100 * v:.1f}", False),
    ("95 % interval", "top1_low", None, False),
    ("centred top-1 [%]", "centred", lambda v: f"{100 * v:.1f}", False),
    ("95 % interval", "centred_low", None, False),
    ("needles", "clips", str, False),
    ("time [s]", "seconds", lambda v: f"{v:.3g}", False),
    ("peak memory [MiB]", "peak_memory", lambda v: f"{v / 2**20:,.1f}", False),
    ("outcome", "status", str, True),
)


def build_page(
    lines: Sequence[dict], pictures: Mapping[str, tuple[bytes, str]], environment: Mapping, protocol: Mapping
) -> str:
    """The page's HTML. pictures: PNG and caption by name."""
    shown = "".join(
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
        for png, caption in pictures.values()
    )
    machine, configuration = environment.get("machine", {}), environment.get("configuration", {})
    facts = "".join(
        f'<tr><td class="text">{escape(str(key))}</td><td class="text">{escape(str(value))}</td></tr>'
        for key, value in machine.items()
    )
    kinds = "".join(
        f"<li><b>{escape(kind)}</b>: {escape(DESCRIPTIONS[kind])}</li>"
        for kind in dict.fromkeys(panel.haystack for panel in panels_of(lines))
    )
    needles = max((line.get("clips") or 0 for line in lines), default=0)
    sources = "".join(
        f"<li>{escape(point.model)}, {describe_length(point.seconds)}: {'at most ' if point.at_most else ''}"
        f"{point.percent:.0f} % ({escape(point.source)})</li>"
        for point in PUBLISHED
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,">
<title>Audio needle in a haystack</title><style>{STYLE}</style></head><body>
<h1>Audio needle in a haystack</h1>
<p class="note">{escape(str(environment.get("needles", needles)))} needles: {escape(str(protocol.get("needles", "?")))}.
A needle is a clip as long as those the model was trained on; it begins at the given part of the input's length and the
model classifies the whole input in one pass. mAP is over the classes that the needles have; what is kept is relative to
the same needles at the shortest length; intervals are 95 % bootstrap intervals over needles, paired for the ratio. Top-1:
the share of needles one of whose classes has the highest score; centred: after each class's mean score over the needles of
the cell is subtracted, which takes away what the haystack adds to all. By chance: what scores that know nothing would
reach on average, the more the fewer the needles are.</p>
<h2>How long an input may be</h2>{_summary(lines)}
<h2>Pictures</h2>{shown}
<h2>Every cell</h2>
<p><input id="filter" placeholder="filter: words of a row" aria-label="filter"></p>
<div class="scroll">{_table(lines)}</div>
<h2>Haystacks</h2><ul>{kinds}</ul>
<p class="note">SNR: root mean square of the needle over that of the whole haystack. Placing:
{escape(str(protocol.get("placing", "")))}.</p>
<h2>Published points</h2><p class="note">Drawn hollow in the panel of mean-spectrum, the published haystack. They are of
DASS-small and AST trained on AudioSet, not of the models tested here.</p><ul>{sources}</ul>
<h2>Configuration</h2><pre>{escape(json.dumps(configuration, indent=2))}</pre>
<h2>Machine</h2><table>{facts}</table>
<script>{SCRIPT}</script></body></html>
"""


def half_kept(lines: Sequence[dict], model: str, panel: Panel, key: str) -> str:
    """The longest input up to which at least half of what the shortest reaches is kept, all between included.

    key: "retention", of the mAP, or "top1", of what is right beyond chance.
    """
    points = curve_points(lines, model, panel, key)
    if not points:
        return "no result"
    chance = dict(chance_points(lines, panel, "top1_chance")) if key == "top1" else {}
    first = points[0][1] - chance.get(points[0][0], 0.0)
    kept = []
    for seconds, value, _, _ in points:
        if value - chance.get(seconds, 0.0) < first / 2:
            break
        kept.append((seconds, value))
    if len(kept) < 2 <= len(points):
        seconds, value = points[1][:2]  # of what is lost at once, how far
        return f"none ({value:.0f} % at {describe_length(round(seconds, 2))})"
    if not kept:  # the shortest input already no better than chance
        return "none"
    text = f"{describe_length(round(kept[-1][0], 2))} ({kept[-1][1]:.0f} %)"
    if len(kept) < len(points):
        return text
    failed = [line["status"] for line in failures(lines, model, panel) if line["input_seconds"] > kept[-1][0]]
    return f"{text}, then {failed[0]}" if failed else f"≥ {text}"


def disagreements(lines: Sequence[dict]) -> list[str]:
    """For each model and haystack the shortest input that keeps half of the mAP but not half of the top-1, both beyond
    what chance gives."""
    found = []
    for model in models_of(lines):
        for panel in panels_of(lines):
            decided = curve_points(lines, model, panel, "top1")
            kept, centred = (
                {seconds: value for seconds, value, _, _ in curve_points(lines, model, panel, key)}
                for key in ("retention", "centred")
            )
            chance, floor = (dict(chance_points(lines, panel, f"{key}_chance")) for key in ("top1", "retention"))
            for seconds, value, _, _ in decided[1:]:
                guessed = chance.get(seconds, 0.0)
                ordered = kept.get(seconds, 0.0) >= (100 + floor.get(seconds, 0.0)) / 2
                if ordered and value - guessed < (decided[0][1] - guessed) / 2:
                    found.append(
                        f"{model}, {panel.title}, {describe_length(round(seconds, 2))}: {kept[seconds]:.0f} % of the mAP "
                        f"is kept, but the highest score is the needle's for {value:.0f} % of the needles only "
                        f"({decided[0][1]:.0f} % at the shortest input, {guessed:.0f} % by chance)"
                        + (f"; centred: {centred[seconds]:.0f} %" if seconds in centred else "")
                    )
                    break
    return found


def _disagreements(lines: Sequence[dict]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in disagreements(lines))
    if not items:
        return ""
    return (
        '<h2>Where mAP flatters</h2><p class="note">mAP orders the inputs by the score of one class after another. Where '
        "the haystack adds the same to that score in every input, the order lasts while another class has the highest "
        "score in all of them. What is left once each class's mean score over the needles is subtracted stands last "
        f"(centred top-1). The shortest inputs at which that is seen:</p><ul>{items}</ul>"
    )


def _summary(lines: Sequence[dict]) -> str:
    panels = panels_of(lines)
    head = "".join(f"<th>{escape(panel.title)}</th>" for panel in panels)
    rows = "".join(
        f'<tr><td class="text">{escape(model)}</td><td class="text">{name}</td>'
        + "".join(f"<td>{escape(half_kept(lines, model, panel, key))}</td>" for panel in panels)
        + "</tr>"
        for model in models_of(lines)
        for name, key in (("mAP", "retention"), ("top-1", "top1"))
    )
    return (
        '<p class="note">Longest input up to which at least half is kept of what the shortest one reaches, in the mean '
        "over positions: of the mAP (and what is kept there), and of the top-1 beyond chance (and the top-1 there); ≥: at "
        "every length tested; none: not at the next longer one.</p>"
        '<div class="scroll"><table><thead><tr><th class="text">model</th><th class="text">half of</th>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>{_disagreements(lines)}"
    )


def _table(lines: Sequence[dict]) -> str:
    head = "".join(f'<th class="sort{" text" if text else ""}">{escape(title)}</th>' for title, _, _, text in COLUMNS)
    rows = []
    for line in lines:
        cells = []
        for _, key, written, text in COLUMNS:
            value = line.get(key)
            if written is None:  # an interval
                high = line.get(key.replace("_low", "_high"))
                shown = "" if value is None or high is None else f"{100 * value:.1f} to {100 * high:.1f}"
            else:
                shown = "" if value is None else written(value)
            if key == "status" and value != OK:
                cells.append(f'<td class="why">{escape(shown)}: {escape(str(line.get("error", "")))}</td>')
                continue
            number = "" if text or value is None else f' data-v="{value}"'
            kind = ' class="text"' if text else ""
            cells.append(f"<td{kind}{number}>{escape(shown)}</td>")
        kind = "" if line["status"] == OK else ' class="failed"'
        rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
    return f'<table id="cells"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
