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

from .inputs import ANSWER_TAG


# Letters and digits go on with a word, but for scripts written without spaces: in "选B因为" the B stands alone
_WORD = r"[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
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

# ---- What may stand around a letter

_BECAUSE = "because|since|as|due|but|if|which|where"
_GOES_ON = (
    f"(?:{_BECAUSE}|and|or|nor|not|for|so|when|while|although|though|rather than|instead|here|by|according|from|with|"
    "on|in|at|given|based|that|again|therefore|thus|hence|then|I)"
)
_SPECIES = (
    "elegans|coli|subtilis|cereus|anthracis|thuringiensis|pertussis|melanogaster|rerio|difficile|botulinum|tetani|"
    "perfringens|albicans|jejuni|burgdorferi|diphtheriae|trachomatis|neoformans|discoideum|rapa|oleracea|napus|"
    "thaliana|tumefaciens|aegypti|gambiae|fumigatus|niger|nidulans|baumannii|mellifera|taurus|familiaris|reinhardtii"
)
_STOP = (
    rf"\s*(?:$|</answer>|\((?<=\s\()(?!mod\b)|[\n,;:!?)\]\"—–…。、\u3400-\u9fff]|\.(?!\w)(?!\s*(?:{_SPECIES})\b)|-\s)"
)
_ATTACHED = re.compile(rf"{_WORD}|[°^=+*/']|-\w|\s*[=+^]|\s*-\s*\d")
_ENDED = re.compile(rf"{_STOP}|\s+{_GOES_ON}\b(?!-)")
# "A" and "I" are words, too: "a because" can't go on with a noun, "a not too simple one" can
_ENDED_ARTICLE = re.compile(rf"{_STOP}|\s+(?:{_BECAUSE}|and|or|nor|for|by|from|with|in|at|here|instead)\b(?!-)")
_VERB = re.compile(r"\s+(?:is|are|was|were|can|cannot|can't|has|have|does|do|would|isn't|aren't|don't|doesn't)\b")
_SUBJECT_AFTER = re.compile(
    r"(?:^|[.,;:!?()\n\"]|<answer>|\b(?:so|therefore|thus|hence|that|then|and|or|nor|but|only|only statement|because|"
    r"since|clearly|both|neither|either|think|believe|means|conclude|say|wait|actually|no|if|is|makes?|making|while|"
    r"although))\s*$",
    re.IGNORECASE,
)

# ---- What the clause before takes back or leaves open

_CLAUSE_END = re.compile(
    r"[.,;:!?()\n—–]|(?<!\ball )(?<!thing )\bbut\b|\b(?:so|because|and|however|thus|hence|therefore|then|while|"
    r"although)\b",
    re.IGNORECASE,
)
_NEGATED = re.compile(
    r"\b(?:not|never|neither|nor|cannot|hardly|unlikely|no (?:way|evidence|reason)|impossible|wrong|"
    r"incorrect|false that|disagree|deny|dispute|refuse|fail|nobody|no one|reject\w* (?:the|that|this|any))\b|n't\b|"
    r"(?<!no )\bdoubt\b",
    re.IGNORECASE,
)
_LEFT_OPEN = re.compile(
    r"\b(?:if|whether|suppos\w+|assum\w+|unless|imagine|could|might|may|maybe|perhaps|possibly|some|many|others?|"
    r"people|students?|someone|they|common|mistake\w*|tempt\w+|trap|misconception|wrongly|incorrectly|first thought|"
    r"(?:you|he|she|user|student|teacher|friend|author) (?:says?|said|thinks?|thought|claims?|claimed)|"
    r"(?:all|everything|anything) (?:but|except))\b",
    re.IGNORECASE,
)
# "Had it been larger, the answer would be B", but "if I had to choose, I'd say B"
_WOULD = re.compile(r"\bwould\b|'d\b", re.IGNORECASE)
_UNREAL_IF = r"if (?!I |you )[^.!?\n]{0,200}\b(?:were|had|was|asked)\b"
_UNREAL_BEFORE = re.compile(rf"(?:^|[.!?;\n] ?)(?:(?:had|were) (?!I )|{_UNREAL_IF})[^.!?\n]*$", re.IGNORECASE)
_UNREAL_AFTER = re.compile(rf",? (?:only )?{_UNREAL_IF}", re.IGNORECASE)
_THEN_DENIED = re.compile(
    r" \((?:incorrect|wrong)\b"
    r"|,? \(?(?:but|which) (?:is|that is|that's|this is|would be) (?:not|wrong|incorrect|false)\b"
    r"|,? (?:but|which|though|although) (?:(?:that|this|it)(?:'s| is| was)|is|was|(?:turns|turned) out(?: to be)?|"
    r"(?:proves|proved)(?: to be)?) (?:wrong|incorrect|false|not (?:it|correct|right|true|possible))\b"
)
_TAKEN_BACK = (
    r"(?:(?:this|that|it|(?:my|the|this|that) (?:answer|choice|option))(?: is|'s| was)(?: (?!not\b)\w+)? "
    r"(?:wrong|incorrect|a mistake|not (?:it|correct|right))"
    r"|(?:this|that|it) (?:isn't|wasn't|can't be|cannot be) (?:it|correct|right)"
    r"|(?:this|that|it) (?:doesn't|does not) (?:work|fit|hold|make sense)"
    r"|I(?:'m| am| was) (?:wrong|mistaken)|I disagree|I made (?:a mistake|an error)|I take (?:that|it) back"
    r"|(?:scratch|forget|strike) that|never ?mind|(?:just|I'm) (?:kidding|joking)"
    r"|(?:no|wait),? (?:no|it isn't|it's not|it is not)(?! \w))"
    rf"(?=\s*(?:$|[.,;:!)\n]|(?:{_BECAUSE})\b))"
)
_SELF_CORRECTION = r"(?:(?:no|wait|sorry|oops|hmm|hold on)\b[,.:;!…]* ?)"
_THEN_TAKEN_BACK = re.compile(
    rf"(?:(?:[^.!?\n]|\.(?=\d)){{0,200}}[.!\n] ?| ?)(?:{_SELF_CORRECTION}|(?:but|however|actually),? )*{_TAKEN_BACK}",
    re.IGNORECASE,
)
_ALL_TAKEN_BACK = re.compile(rf"(?:^|[.!\n] ?|</answer> ){_SELF_CORRECTION}+{_TAKEN_BACK}", re.IGNORECASE)
_ON_CONDITION = re.compile(r",? (?:only )?(?:if|unless|provided)\b")
_CALLED_WRONG = re.compile(
    r"[.:)\]]?[ –—-]*(?:this |the )?(?:it's |(?:(?:it|answer|option|choice) )?is )?(?:not|no|incorrect|wrong|false)\b"
    r"|[.:)\]]?[^.!?\n]*\bis (?:incorrect|wrong|false|not (?:one|the|correct|right))\b"
    r"|[.:)][^.!?\n]*[.!?:] ?this (?:answer|option|choice) is (?:incorrect|wrong)",
    re.IGNORECASE,
)
# "I think A, B and C are wrong", but "the answer is B, A and C are wrong"
_OPENS_SENTENCE = re.compile(
    r"\b(?:think|believe|guess|say|conclude|that|wait|actually|correction|sorry|no)[,:;]? [(\[{\"']?$", re.IGNORECASE
)
_REASONED = re.compile(r"\b(?:wrong|incorrect|because|since|not)\b|n't\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?\n]")
_CORRECTS = re.compile(
    r"\b(?:wait|actually|correction|sorry|on second thought|reconsider|reflection|closer (?:look|inspection)|rather|"
    r"instead)\b|\bno[,.!:]",
    re.IGNORECASE,
)

# ---- Statements; {M} is a mention of a choice, and spaces stand for any white space

_SURELY = (
    r"(?: ?(?:therefore|thus|then|hence|probably|most likely|likely|clearly|definitely|surely|certainly|actually|"
    r"indeed|obviously|simply|still|again|in fact|either|both|:|,))*"
)
_COPULA = r"(?: (?:is|was|are)|'s| (?:must|should|would|will|has to|have to|seems to|appears to) be)\b"
_ABOUT = (
    r"(?: (?:to|of|for|in|on|from|among|with|the|this|that|these|those|above|below|given|following|question|problem|"
    r"options?|choices?|case|here|I|I'd|we|would|choose|select|pick|based|context|scenario|passage|text|my|your|"
    r"provided|listed|therefore|thus|then|now|most|likely|best|fits|matches|one|\d+)){0,8}?"
    r"(?:, (?:however|therefore|then|thus|of course|in my opinion|in this case|I think|I believe),)?"
)
_GOOD = r"(?:most )?(?:correct|right|best|better|final|only|remaining|appropriate|accurate|suitable|likely|single)"
_PICKED = (
    rf"(?:answers?|ans|choices?|options?|selection|pick|guess|{_GOOD} (?:\w+ )?(?:one|statement|letter|alternative|"
    r"explanation|description|response|solution|conclusion))"
)
# "The second best answer", "your answer"
_ANOTHER = re.compile(
    r"\b(?:least|worst|poorest|weakest|bad|second|third|next|runner-up|alternative|opposite|distractor|decoy|"
    r"eliminated|rejected|excluded|previous|initial|original|earlier|(?<!is )your|his|her|their)"
    r"(?:[ -](?!the\b|my\b)\w+(?:'s)?){0,2}[ -]?$",
    re.IGNORECASE,
)
_NAMES_ANSWER = re.compile(rf"{_PICKED}\b|{_GOOD}\b|most\b", re.IGNORECASE)
_CHOOSING = (
    r"(?:choose|chose|select|selected|pick|picked|choosing|selecting|go with|going with|go for|going for|opt for|"
    r"settle on|switch to|switching to|change to|changing to|say|guess|think|believe|answer|vote for|conclude|"
    r"stick with|lean towards?|leaning towards?)"
)
# "We choose A as the origin", "A from the set"
_NO_ROLE = (
    rf"(?! as (?:the|an?|our|my) (?!(?:{_GOOD} )*(?:answer|choice|option)\b)"
    r"| from (?:the|an?|our|this) (?!(?:\w+ )?(?:options|choices|answers|alternatives|list)\b)"
    r"| (?:at random|so that|such that|to be)\b)"
)

COMMITS = (
    rf"\b{_PICKED}{_ABOUT}{_COPULA}{_SURELY} ?\n?{{M}}",
    r"\b(?:answer|ans|choice|option|selection|pick|guess|response)\"?(?: to (?:the|this) question)?"
    r"(?: ?(?:[-=]+>|[:=–—→-]) ?\n?){M}",
    r"(?:^|\n)(?:(?:my|the|final|correct) )*answer\n{M}",
    r"(?:^|\n)(?:(?:the|correct|final|answer|option) )*(?:correct|letter|answer key): {M}",
    r"(?:^|\n)solution: {M}(?=\.?(?:\n|$))",
    r"\b(?:answer|option|choice), {M}(?=,)",
    r"\bans\. {M}",
    r"(?:^|[.;:\n] ?)(?:(?:my|the|final|correct) )*answer (?=[(\[]){M}(?=[.\n]|$)",
    # "The answer is 5 m, which is option B"
    rf"\b{_PICKED}{_ABOUT}{_COPULA} (?!not\b)[^.,!?\n()]{{1,80}}?(?:,? (?:which is|that is,?|i\.e\.,?|namely,?))? ?"
    r"\(?{N}",
    rf"{{S}}{_COPULA}{_SURELY} (?:the |my |our )?(?:{_GOOD} )*(?:answer|choice|option|one|response|pick)\b"
    r"(?! (?:to|for|of|in) (?:an?|another|the (?:other|previous|next|wrong))\b)",
    r"(?:n't|\bnot) (?:[^.,;!?\n]{0,30} )?(?:answer|option|choice|correct|right|best|\(?[A-Z]\)?)[,;.]? "
    r"(?:but )?{S} is(?= ?(?:[.!;\n]|$))",
    r"\b(?:I|we)(?:'d|'ll|'m| am| would| will| should| must| can)?"
    r"(?: (?:therefore|thus|probably|rather|still|now|then|definitely|have to|going to))*"
    rf" {_CHOOSING}(?: (?:that|it's|it is|it must be|it has to be))*:? {{M}}{_NO_ROLE}",
    rf"(?:^|[.,;:\n] ?|\bso )(?:choose|select|pick|go(?:ing)? with|choosing) {{M}}{_NO_ROLE}",
    r"\b(?:so|then),? {S} it is\b",
    r"\b(?:wait|actually|correction|sorry|no|I mean|I meant|scratch that|on second thought|on reflection)[,:;] {M}",
    r"\bactually {M}(?= ?(?:[.!\n]|$))",
    r"\b(?:wait|actually|sorry|oops|no)[,.:;!] I mean(?:t)? {M}",
    r"\bor,? (?:rather|better|more \w+),? {M}",
    r"\b(?:chang|switch|revis)\w* (?:my|the) (?:\w+ )?(?:answer|choice|pick|guess|selection) "
    r"(?:from (?:option )?\(?[A-Z]\)? )?to {M}",
    rf"\b(?:{_GOOD}|most \w+) \w+(?: [\w-]+){{0,6}}?{_COPULA}{_SURELY} {{N}}",
    rf"\bmak(?:es|ing) {{S}} (?:the|our|my) (?:{_GOOD} )*(?:answer|choice|option)\b",
    r"(?:\bnot|n't) (?:option )?\(?[A-Z]\)?,? but (?:rather )?{M}",
    r"(?:答案|选项)(?:应该)?(?:是|为|选|:)? ?{M}",
    r"(?<!不)选择? ?{M}",
)
TAKES_BACK = (
    r"{S} (?:is|was|can|could|would|must|should|does|do)(?: not|n't|not)\b",
    r"{S} (?:is|was)(?: \w+)? (?:incorrect|wrong|false|ruled out|eliminated|out|impossible)\b",
    r"\b(?:rul(?:e|es|ed|ing)|eliminat(?:e|es|ed|ing)|exclude|discard|reject)(?: out)? {M}",
    r"(?:n't|\bnot|cannot)(?: be)? {M}",
)
HINTS = (
    rf"{{S}}{_COPULA}{_SURELY} (?:the )?(?:most )?(?:correct|right)\b",
    rf"\b(?:it|that|this){_COPULA}{_SURELY} {{M}}",
    r"(?:\b(?:so|therefore|thus|hence|by elimination|i\.e\.)|(?<!\b[A-Z])(?<!\b[A-Z] )(?:[∴→⇒]|=>))[,:]? ?"
    r"{M}(?=\s*[.!]?\s*(?:\n|$))",
    r"\b(?:corresponds? to|match(?:es)?|leads? to|points? to|which is|namely|given by|described by) (?:only )?{N}",
    r"\b(?:(?:leaves?|leaving)(?: us)?(?: with)?|left with)(?: only)? {M}",
    r"\bonly (?:statement )?{S} (?!(?:(?:is|was|does|do|can|could|has)(?:n't|not| not)?|"
    r"fails|violates|contradicts|lacks|differs|ignores)\b)\w",
    r"{S} (?:(?:best|correctly|most \w+) \w+|fits|matches|works|makes (?:the most |most )?sense)\b",
    r"{S} (?:seems|looks|sounds|appears)(?: to be)?(?: the)?(?: most)?"
    r" (?:right|correct|best|plausible|likely|reasonable)\b",
    r"\b(?:best|correctly|most \w+) \w+ by {N}",
    r"\((?=(?:option|choice|answer)\b){M}[.!]?\Z",
    r"(?:^|\n|[.;] ?){M} ?[:.)–-] ?(?:this is |it is |it's )?(?:the )?(?:correct|right)\b",
)
# Nothing but a choice, or a choice and its text
BARE = (
    r"\A{M}",
    r"\n{M}(?:[.:)] [^\n]*|[.)])?\Z",
    r"[.!?:] (?=[(\[]){M}\.?\Z",
    r"(?<!\b[A-Z])[.!] {M}\.\Z",
)


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
        for match in _ALL_TAKEN_BACK.finditer(text):
            yield Event(match.start(), "open", "")
        for tag in ANSWER_TAG.finditer(text):
            content = tag[1].strip()
            mention = self.mention.match(content)
            listed = mention and (
                self._several(content, mention) or self._is_list_of_options(content, mention, bare=True)
            )
            if listed or self.run.fullmatch(content) or _THEN_TAKEN_BACK.match(text, tag.end()):
                yield Event(tag.start(), "open", "")
            elif mention and self._stands_alone(content, mention):
                yield Event(tag.start(), "commit", mention["letter"].upper())
        for pattern in self.bare:
            bare = pattern.search(text)
            if bare and self._is_bare_choice(text, bare):
                yield Event(bare.start(), "hint", bare["letter"].upper())

    def _is_bare_choice(self, text: str, match: re.Match[str]) -> bool:
        if _is_asked(text, match) or _CALLED_WRONG.match(text, match.end()):
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
        if _THEN_DENIED.match(text, end):
            return None
        if _is_asked(text, match) or (kind == "commit" and not subject and self._is_list_of_options(text, match)):
            return None
        before = text[max(0, place - 200) : place]
        clause = _CLAUSE_END.split(before)[-1]
        if _LEFT_OPEN.search(clause):
            return None
        if not subject and _ANOTHER.search(clause) and _NAMES_ANSWER.match(text, place):
            return None
        if _WOULD.search(match[0]) and (_UNREAL_BEFORE.search(before) or _UNREAL_AFTER.match(text, end)):
            return None
        if _NEGATED.search(clause):
            return None if kind == "back" else Event(place, "back", letter)
        if kind == "back":
            return Event(place, kind, letter)
        if self._several(text, match) or (subject and self.joined_before.search(before[-20:])):
            return Event(place, "open", "") if kind == "commit" else None
        if _THEN_TAKEN_BACK.match(text, end) or (kind == "commit" and self._on_condition(text, match)):
            return Event(place, "open", "") if kind == "commit" else None
        if kind == "hint" and _CORRECTS.search(text[max(0, place - 60) : match.end()]):
            kind = "commit"
        return Event(place, kind, letter)

    def _stands_alone(self, text: str, match: re.Match[str], *, bare: bool = False) -> bool:
        """Whether a letter is a choice, and not part of a word, of a formula or of a phrase such as "B cells"."""
        letter, end = match["letter"], self._end(match)
        if self._several(text, match):
            return True
        if _ATTACHED.match(text, end):
            return False
        if end > match.end("letter") or (match["named"] and letter.isupper() and not bare):
            return True
        if letter == "a" and end == len(text) and text != text.lower():
            return False  # more likely an article before the text was cut off
        return bool((_ENDED_ARTICLE if letter in "AaIi" else _ENDED).match(text, end))

    @staticmethod
    def _end(match: re.Match[str]) -> int:
        """Where a mention ends, its closing bracket or quotation mark included; a lone ' is none, as in "A's"."""
        closed = match["close"] and (match["close"] not in "\"'" or match["open"] == match["close"])
        return match.end("close" if closed else "letter")

    def _is_subject(self, text: str, match: re.Match[str]) -> bool:
        if self._end(match) > match.end("letter") or match["named"]:
            return True
        start = match.start("letter")
        return bool(_SUBJECT_AFTER.search(text[max(0, start - 20) : start]))

    def _on_condition(self, text: str, match: re.Match[str]) -> bool:
        """Whether a choice holds on a condition, and another one is named thereafter: "A if n is even, else B"."""
        if not _ON_CONDITION.match(text, match.end()):
            return False
        sentence = _SENTENCE_END.split(text[match.end() : match.end() + 200])[0]
        return any(other != match["letter"].upper() for other in self.alone.findall(sentence))

    def _several(self, text: str, match: re.Match[str], *, bare: bool = False) -> bool:
        """
        Whether other choices follow in the same breath: "A or C", but not "the answer is B, C is wrong".

        A bare choice has no statement before it: "B, C are wrong".
        """
        letter, end = match["letter"], self._end(match)
        start = match.start("named" if match["named"] else "letter")
        opens = bare or _OPENS_SENTENCE.search(text[max(0, start - 20) : start])
        separator = None
        while True:
            further = self.further.match(text, end) or self.further.match(text, end + 1)
            if not further or further["letter"].upper() == letter.upper():
                break
            after = further.end()
            verb = _VERB.match(text, after)
            if further["letter"].islower() and letter.isupper():  # "B, a metal"
                break
            named = "," not in further["separator"] and further["letter"] not in "AaIi"
            if _ATTACHED.match(text, after) or not (verb or named or _ENDED.match(text, after)):
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
        return bare or not _REASONED.search(text, given.end(), further.end() + 100)

    def _may_be_no_choice(self, text: str, match: re.Match[str]) -> bool:
        """Whether what looks like a choice and its text is "A:" for "Answer:", or the first of steps that follow."""
        letter, line = match["letter"], text[match.end("letter") :].split("\n")[0]
        if match.start() > 0 and len(line) > 2:
            return letter.islower() or letter == self.choices[0]
        return (
            letter in "Aa" and line.startswith(":") and (len(line) == 1 or line[:4] == ": I " or len(line.split()) > 9)
        )


def _is_asked(text: str, match: re.Match[str]) -> bool:
    ending = _SENTENCE_END.search(text, match.end(), match.end() + 200)
    return ending is not None and ending[0] == "?"


@lru_cache(maxsize=16)
def _reader(choices: str) -> _Reader:
    return _Reader(choices)
