"""The report as one HTML page that needs nothing else: no script, no style, no font and no image from elsewhere."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from . import plots
from .guide import Group, note
from .runs import Measurement, Run, summarize


STYLE = """
:root { color-scheme: light dark; --page: #f6f8fa; --card: #ffffff; --ink: #1f2328; --muted: #59636e; --grid: #d8dee4;
  --accent: #0072b2; LIGHT }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --card: #161b22; --ink: #e6edf3; --muted: #9da7b3;
  --grid: #30363d; --accent: #56b4e9; DARK } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 28px 20px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 1.2rem; margin: 40px 0 0; padding-top: 8px; }
p { margin: 2px 0 12px; color: var(--muted); }
nav { display: flex; flex-wrap: wrap; gap: 6px; margin: 18px 0 0; }
nav a { padding: 3px 11px; border: 1px solid var(--grid); border-radius: 99px; background: var(--card); color: var(--ink);
  text-decoration: none; font-size: 0.85rem; }
nav a:hover { border-color: var(--accent); color: var(--accent); }
.legend { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: 4px 18px; padding: 9px 0; margin-top: 14px;
  background: var(--page); border-bottom: 1px solid var(--grid); font-size: 0.85rem; }
.swatch { display: inline-block; width: 22px; height: 0; border-top: 3px solid; margin-right: 7px; vertical-align: middle; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 14px; }
figure { margin: 0; padding: 12px 14px 8px; background: var(--card); border: 1px solid var(--grid); border-radius: 10px;
  min-width: 0; }
figcaption { display: flex; flex-direction: column; min-height: 3.6em; }
.low figcaption { min-height: 0; }
figcaption b { font: 600 0.9rem ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
figcaption span { color: var(--muted); font-size: 0.8rem; line-height: 1.35; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--grid); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; white-space: nowrap; border-top: 1px solid var(--grid); }
thead th { border-top: 0; color: var(--muted); font-weight: 500; }
th:first-child, td:first-child, .text { text-align: left; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 5em; max-width: 22em; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--accent); font-size: 0.85rem; margin-bottom: 8px; width: max-content; max-width: 100%; }
small { color: var(--muted); }
"""

# Each of `plots.SERIES`, bright enough for a dark page
DARK_SERIES = ("#4aa8e8", "#ff8f4d", "#2fc79a", "#e79cc4", "#f2b632", "#8fd0f5", "#a893f0", "#b9b96c")

# Of a run's arguments, what the overview has in columns, or what differs without a meaning
_APART = ("command", "output_dir", "task", "method", "teacher", "model_name_or_path", "run_name", "logging_dir")


def page(
    title: str,
    runs: Sequence[Run],
    measurements: Sequence[Measurement],
    groups: Sequence[tuple[Group, list[str]]],
    made: str,
) -> str:
    """
    The page.

    Args:
        title: Its heading.
        runs: Training runs, in the order of their colors.
        measurements: Results of `vpd-trl evaluate`.
        groups: The metrics of the runs, by group.
        made: When and by what it was made, in words.
    """
    sections = [_group_section(group, metrics, runs) for group, metrics in groups]
    links = [(group.key, group.title) for group, _ in groups]
    if measurements:
        links.insert(0, ("evaluations", "Evaluations"))
        sections.insert(0, _measurement_section(measurements))
    navigation = "".join(f'<a href="#{key}">{html.escape(text)}</a>' for key, text in links)
    legend = "".join(f"<span>{_name(i, run)}</span>" for i, run in enumerate(runs))
    parts = [
        f"<h1>{html.escape(title)}</h1><p>{html.escape(made)}</p>",
        _overview(runs) if runs else "",
        _differences(runs),
        f"<nav>{navigation}</nav>",
        f'<div class="legend">{legend}</div>' if len(runs) > 1 else "",
        *sections,
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_style()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: Sequence[int] = ()) -> str:
    """A table of cells that are HTML already; columns in `texts` hold words, others numbers."""

    def cell(tag: str, i: int, content: str) -> str:
        kind = ' class="text"' if i in texts else ""
        return f"<{tag}{kind}>{content}</{tag}>"

    top = "".join(cell("th", i, name) for i, name in enumerate(head))
    body = "".join("<tr>" + "".join(cell("td", i, c) for i, c in enumerate(row)) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def number(value: float | None) -> str:
    """A number as a person reads it: four digits that count, – for none."""
    if value is None:
        return "–"
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.2e}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _style() -> str:
    def colors(values: Sequence[str]) -> str:
        return " ".join(f"--series-{i}: {color};" for i, color in enumerate(values))

    return STYLE.replace("LIGHT", colors(plots.SERIES)).replace("DARK", colors(DARK_SERIES))


def _name(i: int, run: Run) -> str:
    """A run's label beside its color."""
    line = ("solid", "dashed", "dotted", "dashed")[i // len(plots.SERIES) % 4]
    color = f"var(--series-{i % len(plots.SERIES)})"
    return f'<i class="swatch" style="border-top-color:{color};border-top-style:{line}"></i>{html.escape(run.label)}'


def _overview(runs: Sequence[Run]) -> str:
    head = ["run", "task", "method", "teacher", "model", "steps", "reward: last", "best"]
    evaluated = _main_evaluation(runs)
    rows = []
    for i, run in enumerate(runs):
        said = [html.escape(str(run.arguments.get(name) or "–")) for name in ("task", "method", "teacher")]
        model = html.escape(str(run.arguments.get("model_name_or_path") or "–"))
        row = [_name(i, run), *said, model, f"{run.last_step:,}", *_values("reward", run)[1:]]
        rows.append(row + (_values(evaluated, run)[1:] if evaluated else []))
    if evaluated:
        head += [f"{html.escape(evaluated)}: last", "best"]
    return f"<h2>Runs</h2>{table(head, rows, texts=(0, 1, 2, 3, 4))}"


def _main_evaluation(runs: Sequence[Run]) -> str | None:
    """The metric of evaluations that most runs have, an average if there is one."""
    names = [metric for run in runs for metric in run.series if metric.startswith("eval_") and "@" in metric]
    return max(sorted(set(names)), key=lambda name: ("avg@" in name, names.count(name)), default=None)


def _values(metric: str, run: Run) -> list[str]:
    """The cells first, last and best."""
    points = run.series.get(metric)
    if not points:
        return ["–", "–", "–"]
    summary = summarize(metric, points)
    best = number(summary.best)
    if summary.best_step is not None:
        best += f" <small>at {summary.best_step:,}</small>"
    return [number(summary.first), number(summary.last), best]


def _differences(runs: Sequence[Run]) -> str:
    """The arguments that the runs don't share, for runs of `vpd-trl train`."""
    known = [(i, run) for i, run in enumerate(runs) if run.arguments]
    if len(known) < 2:
        return ""

    def value(run: Run, name: str) -> str:
        return json.dumps(run.arguments[name], ensure_ascii=False) if name in run.arguments else "default"

    names = sorted({name for _, run in known for name in run.arguments} - set(_APART))
    different = [name for name in names if len({value(run, name) for _, run in known}) > 1]
    if not different:
        return ""
    rows = [
        [f"<code>{html.escape(name)}</code>", *(html.escape(value(run, name)) for _, run in known)]
        for name in different
    ]
    head = ["argument", *(_name(i, run) for i, run in known)]
    text = f"{len(different)} more argument{'s differ' if len(different) > 1 else ' differs'}"
    return f"<details><summary>{text}</summary>{table(head, rows, texts=range(len(head)))}</details>"


def _group_section(group: Group, metrics: Sequence[str], runs: Sequence[Run]) -> str:
    figures = []
    for metric in metrics:
        text = html.escape(note(metric).text)
        caption = f"<figcaption><b>{html.escape(metric)}</b><span>{text}</span></figcaption>"
        figures.append(f"<figure>{caption}{plots.metric_svg(metric, runs)}</figure>")
    rows = []
    for metric in metrics:
        for i, run in enumerate(runs):
            points = run.series.get(metric)
            if points:
                name = f"<code>{html.escape(metric)}</code>"
                rows.append([name, _name(i, run), *_values(metric, run), f"{len(points):,}"])
    numbers = table(["metric", "run", "first", "last", "best", "values"], rows, texts=(0, 1))
    return (
        f'<section id="{group.key}"><h2>{html.escape(group.title)}</h2><p>{html.escape(group.text)}</p>'
        f'<div class="grid">{"".join(figures)}</div>'
        f"<details><summary>Numbers</summary>{numbers}</details></section>"
    )


def _measurement_section(measurements: Sequence[Measurement]) -> str:
    names = measurement_metrics(measurements)
    figures = [
        f'<figure class="low"><figcaption><b>{html.escape(name)}</b></figcaption>'
        f"{plots.measurements_svg(name, measurements)}</figure>"
        for name in names
    ]
    rows: list[list[Any]] = []
    for m in measurements:
        for name, (value, low, high) in m.metrics.items():
            spread = "–" if low is None or high is None else f"{low:.1%} – {high:.1%}"
            label = html.escape(plots.measurement_label(m))
            rows.append([label, f"<code>{html.escape(name)}</code>", f"{value:.1%}", spread, f"{m.problems:,}"])
    numbers = table(["evaluation", "metric", "value", "interval", "problems"], rows, texts=(0, 1))
    return (
        '<section id="evaluations"><h2>Evaluations</h2><p>Results of vpd-trl evaluate, with bootstrap intervals over '
        f'problems.</p><div class="grid">{"".join(figures)}</div>'
        f"<details open><summary>Numbers</summary>{numbers}</details></section>"
    )


def measurement_metrics(measurements: Sequence[Measurement]) -> list[str]:
    """All metrics of evaluations, in the order in which they come."""
    return list(dict.fromkeys(name for m in measurements for name in m.metrics))
