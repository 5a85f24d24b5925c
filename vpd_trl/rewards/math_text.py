"""Where a text states its mathematical answer."""

from __future__ import annotations

import re

from .inputs import ANSWER_TAG


LONGEST_ANSWER = 2000  # characters; more is no answer, but something else

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_PLACEHOLDER = re.compile(
    r"(?:\\(?:text|mathrm)\s*\{)?\s*(?:\.{3}|…|\\[lc]?dots|(?:your |the |final )*answer)?\s*\}?\.?", re.IGNORECASE
)
_ANCHOR = re.compile(
    r"(?:\banswer(?: to (?:the|this) (?:question|problem))?[*_]*(?: (?:is|was|would be|equals)\b)?(?:\s*[:=])?"
    r"(?<!answer)|####)[*_]*\s*",  # with something behind the word
    re.IGNORECASE,
)
_FILLER = re.compile(
    r"(?:(?:about|approximately|roughly|simply|just|exactly|equal to|therefore|thus|hence|then|indeed|clearly|now|"
    r"given by|[*_:,])+\s*)+",
    re.IGNORECASE,
)
_DELIMITED = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
# Two letters and more that are no LaTeX command, and a text in LaTeX
_WORD = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{|(?<![\\A-Za-z])[A-Za-z]{2,}")
_COMMAND = re.compile(r"\\(?:begin|end|operatorname|mathbb|mathcal|mathbf)\s*\{[A-Za-z*]+\}")
_GOES_ON = re.compile(
    r"and|or|to|plus|minus|times|divided|million|billion|thousand|hundred|dozen|out|over|squared|cubed|pi|sqrt|mod|"
    r"sin|cos|tan|log|ln|exp|if|not",
    re.IGNORECASE,
)
_PLAIN_WORDS = re.compile(r"[A-Za-z][A-Za-z ,.'-]*")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{([^{}]*)\}")
_DIGIT_SPACE = re.compile(r"(?<=\d)(?:\\[,:; ]|~)(?=\d{3}(?!\d))")  # 5\,000
_ENDING = re.compile(r"(?<![\s~.,;])(?:\s|~|\\[,:; ]|[.,;])+\Z")
_BASE = re.compile(r"(?<![\w^{])\d+_\{?\(?(\d+)")
_TUPLE = re.compile(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]")
_SET = re.compile(r"\\\{[^()\[\]]*,[^()\[\]]*\\\}")
_COMMA = re.compile(r"(?<=\d)(?:,|\{,\}|,\\!)(?=\d{3}(?!\d))")  # 5,000
_UNITS = {
    form: names.split()[0]
    for names in (
        *("mm millimeter millimetre", "cm centimeter centimetre", "m meter metre", "km kilometer kilometre"),
        *("inch in inche", "foot feet ft", "yard yd", "mile mi", "mg milligram", "g gram", "kg kilogram"),
        *("pound lb", "ounce oz", "second s sec", "minute min", "hour h hr", "day", "week", "month", "year yr"),
        *("ml milliliter millilitre", "l liter litre", "cent", "dollar", "degree", "radian"),
    )
    for form in names.split()
}
_SYMBOLS = {
    "−": "-",
    "–": "-",
    "°": "^\\circ ",
    "×": "\\times ",
    "·": "\\cdot ",
    "÷": "/",
    "π": "\\pi ",
    "∞": "\\infty ",
}
_SYMBOLS |= {"≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "∪": "\\cup ", "∅": "\\emptyset ", "√": "\\sqrt "}


def find_answer(text: str, *, strict: bool) -> str | None:
    """
    The answer that a text states, as it stands there, or `None`.

    Args:
        text: The text, without thinking.
        strict: Whether only a box counts.
    """
    if _BOX.search(text):
        return _last_box(text)
    if strict:
        return None
    tags = ANSWER_TAG.findall(text)
    if tags:
        return _short(tags[-1]) and (_whole(tags[-1]) or tags[-1].strip())
    anchors = list(_ANCHOR.finditer(text))
    if anchors:
        end = anchors[-1].end()
        return _short(_leading(text[end : end + 2 * LONGEST_ANSWER]))
    return _short(_whole(text))


def _last_box(text: str) -> str | None:
    """The content of the last box that has any; `None` if the last box is not closed, since the text was cut there."""
    for box in reversed(list(_BOX.finditer(text))):
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[box.end() : box.end() + LONGEST_ANSWER], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                content = text[box.end() : box.end() + brace.start()].strip()
                break
        else:
            return None
        if not _PLACEHOLDER.fullmatch(content):
            return content
    return None


def _short(text: str | None) -> str | None:
    text = (text or "").strip()
    return text if 0 < len(text) <= LONGEST_ANSWER else None


def _whole(text: str) -> str | None:
    """The text if it is nothing but an expression."""
    text = text.strip().strip("*_").strip()
    delimited = _DELIMITED.fullmatch(text)
    if delimited:
        return next(filter(None, delimited.groups()))
    return None if _first_word(text) or "\n" in text or not re.search(r"\w", text) else text.strip(" .;,")


def _first_word(text: str) -> re.Match[str] | None:
    return _WORD.search(_COMMAND.sub(lambda command: "#" * len(command[0]), text))


def _leading(text: str) -> str | None:
    """The expression that a text begins with, as after "the answer is"."""
    filler = _FILLER.match(text)
    text = text[filler.end() :] if filler else text
    delimited = _DELIMITED.match(text)
    if delimited:
        content = next(filter(None, delimited.groups()))
        if not delimited[0].startswith("$") or "\\" in content or not _first_word(content):  # else dollars
            return content
    text = re.split(r"\n|[.;!?](?=\s|$)", text, maxsplit=1)[0]
    text = re.sub(r"\s*(?:percent|per cent)\b", "%", text)
    word = _first_word(text)
    if word is not None:
        if _GOES_ON.fullmatch(word[0]):
            return None
        text = text[: word.start()]
    text = text.strip(" *_`.,;:!$")
    return text if re.search(r"\w", text) else None


def words_of(expression: str) -> str | None:
    """A text answer ("even", "no solution") in a form that can be compared, or `None` for mathematics."""
    text = " ".join(_LATEX_TEXT.sub(r"\1", expression).replace("~", " ").split()).strip(" .")
    if _PLAIN_WORDS.fullmatch(text) and re.search(r"[A-Za-z]{3}", text):
        return text.casefold()
    return None


def normal_form(expression: str) -> str:
    """An expression without what delimits it or groups digits, and with LaTeX for the commonest symbols of Unicode."""
    expression = expression.strip()
    delimited = _DELIMITED.fullmatch(expression)
    if delimited:
        expression = next(filter(None, delimited.groups())).strip()
    for symbol, latex in _SYMBOLS.items():
        expression = expression.replace(symbol, latex)
    return _DIGIT_SPACE.sub("", _ENDING.sub("", expression))


def contradict(one: str, other: str) -> bool:
    r"""
    Whether two expressions differ in what math-verify leaves out.

    That is a base that both have (12_5 and 12_6), a unit that both have (5\text{ m} and 5\text{ cm}), the length of a
    list that says something twice (2,2 and 2), and the order of a tuple, which a set does not have.

    Args:
        one: An expression in its normal form.
        other: Another one.
    """
    both = (one, other)
    bases, units, items = [_bases(e) for e in both], [_units(e) for e in both], [_items(e) for e in both]
    return (
        (all(bases) and bases[0].isdisjoint(bases[1]))
        or (all(units) and units[0] != units[1])
        or (all(items) and len(items[0]) != len(items[1]) and any(len(set(list_)) < len(list_) for list_ in items))
        or {_form(one), _form(other)} == {"set", "tuple"}
    )


def _bases(expression: str) -> set[tuple[str, ...]]:
    """The bases, but ten, of the numbers on each side of an equation."""
    sides = {tuple(sorted(b for b in _BASE.findall(side) if b != "10")) for side in expression.split("=")}
    return sides - {()}


def _units(expression: str) -> list[str]:
    """The units in an expression; none if it has a text that is no unit."""
    words = [word.lower() for text in _LATEX_TEXT.findall(expression) for word in re.findall(r"[A-Za-z]+", text)]
    units = [_UNITS.get(word) or _UNITS.get(word.removesuffix("s")) or "" for word in words]
    return units if all(units) else []


def _items(expression: str) -> list[str]:
    """The items of a list without brackets; none if it has brackets."""
    if re.search(r"[()\[\]]|\\\{", expression):
        return []
    return ["".join(item.split()) for item in _COMMA.sub("", expression).split(",")]


def _form(expression: str) -> str | None:
    text = re.sub(r"\\(?:left|right)(?![a-z])\s*", "", expression)
    return "tuple" if _TUPLE.fullmatch(text) else "set" if _SET.fullmatch(text) else None


def reference_form(answer: str) -> str:
    """A reference answer in the same form; of one with a box, its content."""
    box = _last_box(answer) if _BOX.search(answer) else None
    return normal_form(box if box is not None else answer)
