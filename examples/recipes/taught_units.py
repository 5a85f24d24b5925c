"""The questions of `examples/custom_task.py` as their teacher reads them: with the feedback on a wrong answer."""

from dataclasses import fields

from examples.custom_task import UnitQuestions, explain
from vpd_trl import VPDConfig
from vpd_trl.prompts import CONVERSATION_TEMPLATE
from vpd_trl.text import fill


CRITIQUE_TEMPLATE = next(f.default for f in fields(VPDConfig) if f.name == "critique_template")


class TaughtUnitQuestions(UnitQuestions):
    """Tells how well a model reads feedback: its accuracy here against that in `UnitQuestions`."""

    name = "taught_units"

    def row(self, draw, number, unit, small, factor):
        row = super().row(draw, number, unit, small, factor)
        told = explain([row["answer"]], [row["why"]], [False])[0]
        critique = fill(CRITIQUE_TEMPLATE, critique=told)
        turn = row["prompt"][0]
        turn["content"] = fill(CONVERSATION_TEMPLATE, prompt=turn["content"], solution="", critique=critique)
        return row
