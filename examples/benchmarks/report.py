"""The README's table and the chart of growth from the results files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import eight_billion
from .measures import PHASES


HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE.parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks-table -->", "<!-- /benchmarks-table -->"


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table() -> str:
    """What has been measured, against what, the aim that was set, and whether it is met."""
    rows = ["| measured | against | ratio | aim | met |", "|---|---|---|---|---|"]

    def add(what: str, against: str, value: float, aim: float, *, least: bool = False, beside: str = "") -> None:
        met = "yes" if (value >= aim if least else value <= aim) else "no"
        shown = f"{value:.3f}" if least else f"{value:.2f}"  # what is just below its aim is not to look like it
        rows.append(f"| {what} | {against} | {shown}{beside} | {'≥' if least else '≤'} {aim:.2f} | {met} |")

    work, memory, time, feedback, imports = map(load, ("work", "memory", "time", "feedback", "imports"))
    if memory:
        for mode, found in memory["modes"].items():
            precision = "" if mode == "half precision" else ", float32"
            what = f"`sdpo`, {mode}{precision}: peak memory of a step at 151,936 tokens of vocabulary"
            add(what, "`SDPOTrainer`", found["bytes"]["ratio"], 0.25)
            if precision:  # half precision on a CPU has a time of its own
                add("the same: time", "`SDPOTrainer`", found["seconds"]["ratio"], 1.0)
    if work:
        for coverage, found in work["sdpo"].items():
            what = f"`sdpo`, {coverage.replace('coverage 1', 'feedback on all').replace('coverage 0.5', 'feedback on half')}"
            add(f"{what}: FLOPs of training", "`SDPOTrainer`", found["flops"], 0.8)
        for size, real in work["real tokens by rows of a micro-batch"].items():
            what = f"tokens in forward passes that are real, {size} rows in a micro-batch"
            add(what, "all", real["ours"], 0.95, least=True, beside=f" (`SDPOTrainer` {real['trl']:.2f})")
        what = "`sdpo`, two optimizer steps on each batch: FLOPs of training"
        add(what, "`SDPOTrainer`", work["sdpo, two steps"]["flops"], 0.8)
        add("`vpd`, F = 5: FLOPs of training", "`sdpo`", work["vpd"]["flops"], 1.2)
        what = 'the same with `reward_shift="running"` and `prior="sampling"`'
        add(what, "`sdpo`", work["vpd without passes"]["over sdpo"], 1.2)
    if time:
        for length, found in time["lengths"].items():
            for name, shown in (("vpd", "`vpd`"), ("vpd, running shift", '`vpd`, `reward_shift="running"`')):
                what = f"{shown}, F = 5, completions of {length} tokens: time of a run with generation"
                add(what, "`sdpo`", found[f"{name} over sdpo"]["ratio"], 1.1)
                add("the same", "`GRPOTrainer`", found[f"{name} over trl grpo"]["ratio"], 1.3)
    if feedback:
        added = feedback["added for each second of sleep"]
        met = "yes" if added < 2 else "no"  # in line it would be 64
        rows.append(
            f"| feedback that takes 1 s for each of 64 rollouts: added to a batch | 1 s | {added:.2f} | about 1 | {met} |"
        )
    if imports:
        add("`from vpd_trl import VPDTrainer`", "`from trl import GRPOTrainer`", imports["ratio"], 1.1)
    return "\n".join(rows)


def phases() -> str:
    """Where the time of a run goes."""
    found = load("time") or {"lengths": {}}
    lines = ["| seconds of five steps | " + " | ".join(PHASES.values()) + " |", "|---|" + "---|" * len(PHASES)]
    for length, entries in found["lengths"].items():
        for kind, entry in entries["seconds of phases, medians"].items():
            shown = f"{kind}, {entries['rollouts']} × {length} tokens"
            lines.append(f"| {shown} | " + " | ".join(f"{entry[phase]:.1f}" for phase in PHASES.values()) + " |")
    return "\n".join(lines)


def chart(path: Path) -> None:
    """Operations against each axis, and what would be linear."""
    found = load("growth")
    if found is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = found["axes"]
    figure, panels = plt.subplots(1, len(axes), figsize=(4.6 * len(axes), 3.6), constrained_layout=True)
    for panel, (axis, points) in zip(panels, axes.items(), strict=True):
        x = [point["at"] for point in points]
        y = [point["flops"] / 1e12 for point in points]
        panel.plot(x, y, marker="o", color="tab:blue", label="measured")
        if axis == "processes":
            panel.plot(
                x,
                [point["most of one"] / 1e12 for point in points],
                marker="s",
                color="tab:orange",
                label="of one process",
            )
            panel.set_xticks(x)
        # What a thing adds may be proportional to it beside what it doesn't touch
        slope = (y[1] - y[0]) / (x[1] - x[0])
        panel.plot(x, [y[0] + slope * (at - x[0]) for at in x], ls=":", color="0.5", label="straight line")
        panel.set(xlabel=axis, ylabel="operations of five steps, 10¹²", ylim=(0, None), xlim=(0, None))
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write() -> None:
    eight_billion.put_between(README, BEGIN, END, table())
    eight_billion.put_between(HERE / "README.md", "<!-- phases -->", "<!-- /phases -->", phases())
    chart(RESULTS / "growth.png")
    eight_billion.write()
    print(table())
