"""
Which choice of a multiple-choice question a free text settles on.

A text is read as a sequence of events: it commits to a choice, names several, takes one back, or points at one in
passing (a hint). The last commitment stands; hints count where there is none, if they agree.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

from .choice_patterns import (
    ALL_TAKEN_BACK,
    ANOTHER,
    ATTACHED,
    BARE,
    CALLED_WRONG,
    CLAUSE_END,
    COMMITS,
    CORRECTS,
    ENDED,
    ENDED_ARTICLE,
    HINTS,
    LEFT_OPEN,
    NAMES_ANSWER,
    NEGATED,
    ON_CONDITION,
    OPENS_SENTENCE,
    REASONED,
    SENTENCE_END,
    SUBJECT_AFTER,
    TAKES_BACK,
    THEN_DENIED,
    THEN_TAKEN_BACK,
    UNREAL_AFTER,
    UNREAL_BEFORE,
    VERB,
    WOULD,
)
from .inputs import ANSWER_TAG


_LATEX_STYLE = re.compile(r"\\(?:text|math|emph)(?:bf|rm|sf|it|tt|up|normal)?\s*\{([^{}]*)\}")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_MARKUP: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"<\|[^|<>]*\|>|\\[()\[\],;! ]|\\(?:left|right)(?![a-z])"), " "),
    (re.compile(r"</?(?:b|i|u|em|strong|code)>"), ""),
    (re.compile(r"</?(?!answer>)[A-Za-z]\w*\s*/?>"), "\n"),
    (re.compile(r"~~.*?~~"), " "),  # struck out
    (re.compile(r"[*`$]|(?<![^\W_])_+|_+(?![^\W_])"), ""),
    (re.compile(r"[‘’]"), "'"),
    (re.compile(r"[“”]"), '"'),
    (re.compile(r"\[\[|\]\]"), lambda brackets: brackets[0][0]),
    (re.compile(r"[^\S\n]+"), " "),
    (re.compile(r"\s*\n[\s#>•+-]*"), "\n"),  # also what marks headings, quotes and bullets
)
_NEXT_QUESTION = re.compile(r"\n(?:next )?(?:question|problem|q|human|user)\b ?\d*(?:[:.)\n]|(?<=\d) )", re.IGNORECASE)

_KINDS = {"commit": COMMITS, "back": TAKES_BACK, "hint": HINTS}


class Event(NamedTuple):
    """
    What a text says about a choice at one place.

    Attributes:
        place: The place in the text, in characters.
        kind: "commit", "hint", "back" (taken back) or "open" (several choices at once, or all are taken back).
        letter: The choice, an upper-case letter.
    """

    place: int
    kind: str
    letter: str


def settled_choice(text: str, choices: str) -> str | None:
    """
    The choice that a free text settles on, or `None`.

    Args:
        text: The text, without thinking.
        choices: The choices as upper-case letters.
    """
    reader = _reader(choices)
    for part in _NEXT_QUESTION.split(plain(text)):  # what a model asks itself afterwards is another question
        events = sorted(reader.events(part.strip()))
        if events:
            return _outcome(events)
    return None


def _outcome(events: list[Event]) -> str | None:
    committed: str | None = None
    hints: list[str] = []
    for _, kind, letter in events:
        if kind == "hint":
            hints.append(letter)
        elif kind == "back":
            hints = [hint for hint in hints if hint != letter]
            if committed == letter:
                committed, hints = None, []
        else:
            committed, hints = letter if kind == "commit" else None, []
    if committed is None and len(set(hints)) == 1:
        return hints[0]
    return committed


def plain(text: str) -> str:
    """The text without the markup of LaTeX, Markdown and HTML; a box becomes an `<answer>`."""
    text = unicodedata.normalize("NFKC", text)
    for _ in range(3):  # nested styles
        text = _LATEX_STYLE.sub(r"\1", text)
    text = _BOX.sub(r"<answer>\1</answer>", text)
    text = "\n" + text
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text.strip()


class _Reader:
    """Finds what texts say about some choices."""

    def __init__(self, choices: str) -> None:
        self.choices = choices
        letters = f"[{choices}{choices.lower()}]"
        open_, close = r"(?P<open>[(\[{\"'])?", r"(?P<close>[)\]}\"'])?"
        named = r"(?:the )?(?P<named>(?:answer )?(?:option|choice|answer|letter|alternative) )"
        mention = rf"(?:{named})?{open_}(?P<letter>{letters}){close}"
        clear = rf"(?=(?:the )?(?:option|choice|answer|letter)|[(\[]){mention}"
        self.mention = re.compile(mention, re.IGNORECASE)
        self.run = re.compile(rf"\W*[{choices}](?:[{choices}]+|(?:\W+[{choices}])+)\W*")
        # "… or B." ends a sentence, and begins no option
        no_end = "".join(rf"(?<!\b{word} )" for word in ("or", "and", "is", "be", "not", "than", "with", "to"))
        self.delimited = re.compile(rf"(?<![\w']){no_end}[(\[]?([{choices}])([)\].:]| ?[-–—])(?=\s|$)")
        self.option_line = re.compile(rf"^(?:[Oo]ption )?[(\[]?([{choices}])[)\].:]+(?=\s|$)", re.MULTILINE)
        self.further = re.compile(
            r"(?P<separator>,? ?(?:and/or\b|and\b|\(?or\b|nor\b|(?:as well as|together with|along with)\b|"
            r"[&/和与或、]) ?|, ?)"
            r"(?:(?:maybe|perhaps|possibly|alternatively|also|even),? )*"
            rf"(?:option |choice )?[(\[]?(?P<letter>{letters})[)\]]?"
        )
        self.joined_before = re.compile(rf"(?<!\w){letters}[)\]]?,? ?(?:and|or|nor|[&/和与或、]) ?(?:option )?[(\[]?$")
        self.alone = re.compile(rf"(?<![\w'])[{choices}](?<!I)(?![\w'])")  # "I" is a word
        self.patterns = [
            (kind, re.compile(self._fill(pattern, mention, clear), re.IGNORECASE))
            for kind, patterns in _KINDS.items()
            for pattern in patterns
        ]
        self.bare = [re.compile(self._fill(pattern, mention, clear), re.IGNORECASE) for pattern in BARE]

    @staticmethod
    def _fill(pattern: str, mention: str, clear: str) -> str:
        subject = rf"(?P<subject>)(?<![\w'°-]){mention}"
        return pattern.replace("{M}", mention).replace("{N}", clear).replace("{S}", subject)

    def events(self, text: str) -> Iterator[Event]:
        """What the text says, in no order."""
        for kind, pattern in self.patterns:
            for match in pattern.finditer(text):
                event = self._event(text, match, kind)
                if event is not None:
                    yield event
        for match in ALL_TAKEN_BACK.finditer(text):
            yield Event(match.start(), "open", "")
        for tag in ANSWER_TAG.finditer(text):
            content = tag[1].strip()
            mention = self.mention.match(content)
            listed = mention and (
                self._several(content, mention) or self._is_list_of_options(content, mention, bare=True)
            )
            if listed or self.run.fullmatch(content) or THEN_TAKEN_BACK.match(text, tag.end()):
                yield Event(tag.start(), "open", "")
            elif mention and self._stands_alone(content, mention):
                yield Event(tag.start(), "commit", mention["letter"].upper())
        for pattern in self.bare:
            bare = pattern.search(text)
            if bare and self._is_bare_choice(text, bare):
                yield Event(bare.start(), "hint", bare["letter"].upper())

    def _is_bare_choice(self, text: str, match: re.Match[str]) -> bool:
        if _is_asked(text, match) or CALLED_WRONG.match(text, match.end()):
            return False
        if self._several(text, match, bare=True) or self._is_list_of_options(text, match, bare=True):
            return False
        if self._may_be_no_choice(text, match):
            return False
        return self._stands_alone(text, match, bare=True)

    def _event(self, text: str, match: re.Match[str], kind: str) -> Event | None:
        subject = "subject" in match.re.groupindex
        place, letter, end = match.start("subject" if subject else 0), match["letter"].upper(), match.end()
        place += len(text[place:end]) - len(text[place:end].lstrip(" .,;:\n"))
        if not (self._is_subject(text, match) if subject else self._stands_alone(text, match)):
            return None
        if THEN_DENIED.match(text, end):
            return None
        if _is_asked(text, match) or (kind == "commit" and not subject and self._is_list_of_options(text, match)):
            return None
        before = text[max(0, place - 200) : place]
        clause = CLAUSE_END.split(before)[-1]
        if LEFT_OPEN.search(clause):
            return None
        if not subject and ANOTHER.search(clause) and NAMES_ANSWER.match(text, place):
            return None
        if WOULD.search(match[0]) and (UNREAL_BEFORE.search(before) or UNREAL_AFTER.match(text, end)):
            return None
        if NEGATED.search(clause):
            return None if kind == "back" else Event(place, "back", letter)
        if kind == "back":
            return Event(place, kind, letter)
        if self._several(text, match) or (subject and self.joined_before.search(before[-20:])):
            return Event(place, "open", "") if kind == "commit" else None
        if THEN_TAKEN_BACK.match(text, end) or (kind == "commit" and self._on_condition(text, match)):
            return Event(place, "open", "") if kind == "commit" else None
        if kind == "hint" and CORRECTS.search(text[max(0, place - 60) : match.end()]):
            kind = "commit"
        return Event(place, kind, letter)

    def _stands_alone(self, text: str, match: re.Match[str], *, bare: bool = False) -> bool:
        """Whether a letter is a choice, and not part of a word, of a formula or of a phrase such as "B cells"."""
        letter, end = match["letter"], self._end(match)
        if self._several(text, match):
            return True
        if ATTACHED.match(text, end):
            return False
        if end > match.end("letter") or (match["named"] and letter.isupper() and not bare):
            return True
        if letter == "a" and end == len(text) and text != text.lower():
            return False  # more likely an article before the text was cut off
        return bool((ENDED_ARTICLE if letter in "AaIi" else ENDED).match(text, end))

    @staticmethod
    def _end(match: re.Match[str]) -> int:
        """Where a mention ends, its closing bracket or quotation mark included; a lone ' is none, as in "A's"."""
        closed = match["close"] and (match["close"] not in "\"'" or match["open"] == match["close"])
        return match.end("close" if closed else "letter")

    def _is_subject(self, text: str, match: re.Match[str]) -> bool:
        if self._end(match) > match.end("letter") or match["named"]:
            return True
        start = match.start("letter")
        return bool(SUBJECT_AFTER.search(text[max(0, start - 20) : start]))

    def _on_condition(self, text: str, match: re.Match[str]) -> bool:
        """Whether a choice holds on a condition, and another one is named thereafter: "A if n is even, else B"."""
        if not ON_CONDITION.match(text, match.end()):
            return False
        sentence = SENTENCE_END.split(text[match.end() : match.end() + 200])[0]
        return any(other != match["letter"].upper() for other in self.alone.findall(sentence))

    def _several(self, text: str, match: re.Match[str], *, bare: bool = False) -> bool:
        """
        Whether other choices follow in the same breath: "A or C", but not "the answer is B, C is wrong".

        A bare choice has no statement before it: "B, C are wrong".
        """
        letter, end = match["letter"], self._end(match)
        start = match.start("named" if match["named"] else "letter")
        opens = bare or OPENS_SENTENCE.search(text[max(0, start - 20) : start])
        separator = None
        while True:
            further = self.further.match(text, end) or self.further.match(text, end + 1)
            if not further or further["letter"].upper() == letter.upper():
                break
            after = further.end()
            verb = VERB.match(text, after)
            if further["letter"].islower() and letter.isupper():  # "B, a metal"
                break
            named = "," not in further["separator"] and further["letter"] not in "AaIi"
            if ATTACHED.match(text, after) or not (verb or named or ENDED.match(text, after)):
                break
            separator = separator or further["separator"]
            if verb and separator.startswith(",") and not opens:
                return False
            end = after
        return separator is not None

    def _is_list_of_options(self, text: str, match: re.Match[str], *, bare: bool = False) -> bool:
        """Whether a choice with its text behind it ("A) copper") is just the first of all that there are."""
        given = self.delimited.match(text, match.start("open") if match["open"] else match.start("letter"))
        if given is None:
            return False
        if bare and any(line[1] != given[1].upper() for line in self.option_line.finditer(text)):
            return True
        following = (m for m in self.delimited.finditer(text, given.end()) if m[2] == given[2])
        further = next(following, None)
        if further is None or further[1] != chr(ord(given[1].upper()) + 1):
            return False
        if "\n" in text[given.end() : further.start()] and text[further.start() - 1] != "\n":
            return False
        return bare or not REASONED.search(text, given.end(), further.end() + 100)

    def _may_be_no_choice(self, text: str, match: re.Match[str]) -> bool:
        """Whether what looks like a choice and its text is "A:" for "Answer:", or the first of steps that follow."""
        letter, line = match["letter"], text[match.end("letter") :].split("\n")[0]
        if match.start() > 0 and len(line) > 2:
            return letter.islower() or letter == self.choices[0]
        return (
            letter in "Aa" and line.startswith(":") and (len(line) == 1 or line[:4] == ": I " or len(line.split()) > 9)
        )


def _is_asked(text: str, match: re.Match[str]) -> bool:
    ending = SENTENCE_END.search(text, match.end(), match.end() + 200)
    return ending is not None and ending[0] == "?"


@lru_cache(maxsize=16)
def _reader(choices: str) -> _Reader:
    return _Reader(choices)
