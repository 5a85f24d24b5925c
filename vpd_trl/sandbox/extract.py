"""Finding the program in what a model wrote."""

from __future__ import annotations

import io
import re
import tokenize
from dataclasses import dataclass, replace
from itertools import islice

from .outcome import Status


@dataclass(frozen=True)
class Extraction:
    """
    The program in a text.

    Attributes:
        code: The program; `None` without one.
        otherwise: What it is if it turns out to be no Python: `None` means a program with a syntax error, `TRUNCATED`
            one that the text ends within, `NO_CODE` text that only looked like one.
    """

    code: str | None
    otherwise: Status | None = None


@dataclass(frozen=True)
class _Block:
    """A block of code, the language it is marked with ("" for none), and whether its end is there."""

    code: str
    language: str
    closed: bool = True


_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})(.*)")
_PYTHON = {"python", "py", "python3", "py3", "python2", "pypy", "pypy3", "pycon", "ipython"}
_STATEMENT = re.compile(
    r"\s*(?:(?:async\s+)?def\s+\w+\s*\(|class\s+\w+\s*[:(]|import\s+[\w.]+(?:\s+as\s+\w+|\s*,\s*[\w.]+)*\s*(?:[#;].*)?$|"
    r"from\s+[\w.]+\s+import\b|@\w[\w.]*(?:\(.*)?$|(?:for|while|if|with|try)\b.*:\s*(?:#.*)?$|[\w.]+\s*\(.*\)\s*(?:#.*)?$|"
    r"[\w.\[\], ]+\s*[-+*/|&^%]?=(?!=)\s*\S)"
)
_COMMENT = re.compile(r"(?:^|(?<=\s))#.*", re.MULTILINE)
_READS_INPUT = re.compile(
    r"\binput\s*\(|\bsys\.stdin\b(?!\s*=)|\bstdin\.\w|\bimport\b.{0,99}\bstdin\b|/dev/stdin\b|"
    r"\b(?:open|os\.read)\s*\(\s*0\b|\bfileinput\b"
)
_FEEDS_INPUT = re.compile(
    r"\bstdin\s*=.{0,99}\b(?:String|Bytes)IO\s*\((?!.{0,99}\b(?:stdin|read|open)\b)|"
    r"\bbuiltins\.input\s*=(?!.{0,99}\bstdin\b)|\b(?:patch|setattr)\b.{0,99}\b(?:stdin|input)[\"']|\bsubprocess\b"
)
_STUB = (  # a signature, perhaps what it is for, and no body
    r"^([ \t]*)(?:async\s+)?def\s+%s\s*\((?:[^()]|\([^()]*\))*\)[^\n:]*:\s*"
    r"(?:(\"\"\"|''')(?:(?!\2)[\s\S])*\2\s*)?(?:#.*\n\s*)*(?:\.\.\.|pass)[ \t]*(?:#.*)?$"
    r"(?!(?:\n[ \t]*(?:#.*)?(?=\n))*\n\1[ \t]+[^\s#])"
)
_SENTENCE = re.compile(rf"\s*(?!(?:{'|'.join(_PYTHON)})\b)[^\s`~]+(?:\s+[^\s`]|[.!?:]\s*$)", re.IGNORECASE)
_MOST_ENDS = 8  # fences tried as the end of one block


def extract_code(text: str, entry_point: str | None = None) -> Extraction:
    """
    The program in a text, thinking removed.

    Of several fenced blocks it is the one that defines the function to call, with a body, or, for a script, that reads
    the input and does not feed it itself: a demonstration or an example of output after the solution is not taken for
    it. Of several such blocks it is the last. Of an interactive session, if there is nothing else, it is what was typed
    at the prompts. Blocks marked with another language don't count. Fences may be of backticks or tildes, indented,
    without a language, or with more behind it; a block that the text begins inside of or ends inside of counts too.
    Without any fence the whole text is taken, if it starts like a program.

    Nothing is parsed here: a parser can be crashed by what it is given, and this is not the sandbox.

    Args:
        text: What the model wrote.
        entry_point: Name of the function to call; `None` for a script.
    """
    blocks = _blocks(text.replace("\r\n", "\n").split("\n"))
    if blocks is None:
        stripped = text.strip()
        starts = _STATEMENT.match(_first_line(stripped)) is not None or stripped.startswith(("#", '"""', "'''"))
        return Extraction(stripped + "\n", Status.NO_CODE) if starts else Extraction(None, Status.NO_CODE)
    candidates = [
        block for block in blocks if block.code.strip() and (not block.language or block.language in _PYTHON)
    ]
    if not candidates:
        ends_inside = bool(blocks) and not blocks[-1].closed
        return Extraction(None, Status.TRUNCATED if ends_inside else Status.NO_CODE)
    others = [block for block in candidates if not _is_session(block)]
    if any(_looks_like_code(block.code) for block in others):
        candidates = others
    else:
        candidates = [replace(block, code=_typed(block.code)) if _is_session(block) else block for block in candidates]
    best = max(enumerate(candidates), key=lambda pair: (*_rank(pair[1], entry_point), pair[0]))[1]
    return Extraction(best.code, None if best.closed else Status.TRUNCATED)


def _rank(block: _Block, entry_point: str | None) -> tuple[bool, ...]:
    demo = False
    if entry_point is None:
        code = _COMMENT.sub("", block.code)
        feeds = _FEEDS_INPUT.search(code) is not None
        relevant = not feeds and _READS_INPUT.search(code) is not None
        demo = feeds or (not relevant and "stdin" in block.code)
    else:
        name = re.escape(entry_point)
        defined = rf"\bdef\s+{name}\s*\(|^\s*{name}\s*(?::[^=\n]+)?=(?!=)"
        relevant = re.search(defined, block.code, re.MULTILINE) is not None
        code = re.sub(_STUB % name, "", block.code, flags=re.MULTILINE)
        demo = relevant and re.search(defined, code, re.MULTILINE) is None
    python, looks_like_code = block.language in _PYTHON, _looks_like_code(block.code)
    return relevant, relevant and not demo, python, looks_like_code, not demo, block.closed


def _looks_like_code(code: str) -> bool:
    return any(_STATEMENT.match(line) for line in code.split("\n"))


def _is_session(block: _Block) -> bool:
    """Whether this is what an interactive interpreter shows, with its prompts."""
    return _first_line(block.code).startswith(">>>")


def _typed(session: str) -> str:
    """What was typed in an interactive session."""
    return _joined([line[4:] for line in session.split("\n") if re.match(r"(?:>>>|\.\.\.)(?: |$)", line)])


def _blocks(lines: list[str]) -> list[_Block] | None:
    """The blocks of code; `None` if there is no fence at all."""
    blocks: list[_Block] = []
    at, found = 0, False
    if _begins_inside(lines):
        end = next(i for i, line in enumerate(lines) if _ends(line, "```"))
        blocks.append(_Block(_body(lines, 0, end, None, ""), ""))
        at, found = end + 1, True
    while at < len(lines):
        match = _FENCE.match(lines[at])
        if not match:
            at += 1
            continue
        found = True
        indent, fence, info = match.groups()
        if fence[0] == "`" and "`" in info:  # opened and closed in one line
            inner = info.split(fence)[0].strip("` \t")
            first, _, rest = inner.partition(" ")
            named = first.lower() in _PYTHON and not rest.lstrip().startswith("=")
            blocks.append(_Block(rest.strip() + "\n", first.lower()) if named else _Block(inner + "\n", ""))
            at += 1
            continue
        language, first = _language(info)
        start = at + 1
        ends = list(islice((i for i in range(start, len(lines)) if _ends(lines[i], fence)), _MOST_ENDS))
        bodies = [_body(lines, start, end, first, indent) for end in ends]
        # A fence may be part of a text in the program
        best = next((i for i, body in enumerate(bodies) if _complete(body)), 0)
        if ends:
            blocks.append(_Block(bodies[best], language))
            at = ends[best] + 1
        else:
            blocks.append(_Block(_body(lines, start, len(lines), first, indent), language, closed=False))
            at = len(lines)
    return blocks if found else None


def _begins_inside(lines: list[str]) -> bool:
    """Whether the text starts in a block that the prompt opened: with a program, and a fence too many."""
    fences = [line for line in lines if _FENCE.match(line) or _ends(line, "```")]
    first = _first_line("\n".join(lines))
    if not fences or len(fences) % 2 == 0 or not _STATEMENT.match(first):
        return False
    return _ends(fences[0], "```")


def _ends(line: str, fence: str) -> bool:
    """Whether a line closes a block: with a fence, alone or before a sentence, or behind the last of the code."""
    line = line.rstrip()
    match = _FENCE.match(line)
    if match and fence not in match[3] and _SENTENCE.match(match[3]):
        return match[2].startswith(fence)
    marks = len(line) - len(line.rstrip(fence[0]))
    alone = not line[: len(line) - marks].strip()
    return marks >= len(fence) and (alone or match is None)


def _language(info: str) -> tuple[str, str | None]:
    """The language that a fence names, and code that stands behind it by mistake."""
    words = info.strip().split(maxsplit=1)
    if not words:
        return "", None
    rest = words[1] if len(words) > 1 else ""
    name = re.sub(r"[^\w+#-].*", "", words[0].strip("{}.").lower())
    attributes = re.match(r"[\w+#{}.-]+\s+\w[\w-]*=", info.strip()) is not None
    if name in _PYTHON and rest and not rest.startswith("="):
        return name, rest if _STATEMENT.match(rest) and not attributes else None
    if _STATEMENT.match(info.strip()) and not attributes:
        return "", info.strip()
    return name, None


def _body(lines: list[str], start: int, end: int, first: str | None, indent: str) -> str:
    body = [line[len(indent) :] if line.startswith(indent) else line.lstrip() for line in lines[start:end]]
    if end < len(lines) and not _FENCE.match(lines[end]):  # the fence stands behind code
        body.append(lines[end].rstrip().rstrip("`~"))
    return _joined(([first] if first else []) + body)


def _joined(lines: list[str]) -> str:
    return "\n".join(lines).rstrip("\n") + "\n"


def _first_line(text: str) -> str:
    return next((line for line in text.split("\n") if line.strip()), "")


def _complete(code: str) -> bool:
    """Whether all strings and brackets of a program are closed."""
    try:
        for _ in tokenize.generate_tokens(io.StringIO(code).readline):
            pass
    except tokenize.TokenError:
        return False
    except (SyntaxError, ValueError):  # wrong, but not by ending early
        return True
    return True
