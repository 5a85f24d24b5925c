"""Text that goes into prompts: templates and their fields, thinking, special tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


CUT_MARKER = "\n[... cut ...]\n"

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
_THINK_BLOCK = re.compile(f"{THINK_OPEN}.*?{THINK_CLOSE}", flags=re.DOTALL)


def check_template(name: str, template: Any, *, needs: Sequence[str], one_of: Sequence[str] = ()) -> None:
    """
    Check that a template holds its fields.

    Raises:
        TypeError: If the template is not a string.
        ValueError: If a field of `needs`, or all of `one_of`, are missing.
    """
    if not isinstance(template, str):
        raise TypeError(f"{name} must be a string; got {type(template).__name__}.")
    found = set(re.findall(r"\{(\w+)\}", template))
    missing = [f"{{{f}}}" for f in needs if f not in found]
    if not missing and one_of and not found.intersection(one_of):
        missing = [" or ".join(f"{{{f}}}" for f in one_of)]
    if missing:
        raise ValueError(f"{name} lacks the field {', '.join(missing)}; got {template!r}.")


def fill(template: str, /, **values: str) -> str:
    """
    Replace the named fields of a template, once.

    Braces in the values, or in the template around other names, stay as they are: model text may hold anything.
    """
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def strip_thinking(text: str, *, opened: bool = False) -> str:
    """
    Remove `<think>…</think>` blocks, and an unfinished one at the end.

    `opened` says that the prompt already ended with the opening tag, so that `text` starts inside a block.
    """
    if opened:
        text = THINK_OPEN + text
    before, close, after = text.rpartition(THINK_CLOSE)
    # Blocks end by the last closing tag. Without one the search for each would read the text to its end
    text = _THINK_BLOCK.sub("", before + close)
    # A closing tag without an opening one: everything before it was thinking
    text = text.rpartition(THINK_CLOSE)[2] + after
    return text.partition(THINK_OPEN)[0].strip()


def text_of(content: str | list[dict[str, Any]] | None) -> str:
    """The text of a message whose content is a string or a list of parts."""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if part.get("type") == "text")
    return content or ""


def last_user_turn(conversation: list[dict[str, Any]]) -> int:
    """The place of the last user turn of a conversation that has one."""
    return max(i for i, message in enumerate(conversation) if message["role"] == "user")


def with_text(message: dict[str, Any], text: str) -> dict[str, Any]:
    """The message with another text, its content a string or a list of parts as before; images keep their places."""
    if not isinstance(message["content"], list):
        return {**message, "content": text}
    parts: list[dict[str, Any]] = []
    for part in message["content"]:
        if part.get("type") != "text":
            parts.append(part)
        elif not any(kept.get("type") == "text" for kept in parts):
            parts.append({"type": "text", "text": text})
    if not any(part.get("type") == "text" for part in parts):
        parts.append({"type": "text", "text": text})
    return {**message, "content": parts}


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion: the string itself, or the content of its last assistant message."""
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        if message.get("role") == "assistant":
            return text_of(message.get("content"))
    return ""


class SpecialTokens:
    """
    The special tokens of a tokenizer, which text from a model or from elsewhere must not bring into a prompt.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        longest_first = sorted((re.escape(t) for t in special if len(t) > 1), key=len, reverse=True)
        self._pattern = re.compile("|".join(longest_first)) if longest_first else None

    def escape(self, text: str) -> str:
        """The text with a space behind the first character of each: it stays readable, but holds none any more."""
        while self._pattern and self._pattern.search(text):
            text = self._pattern.sub(lambda match: match[0][0] + " " + match[0][1:], text)
        return text

    def fill(self, template: str, **values: str) -> str:
        """`fill`, but a value can't complete a special token with what stands beside it; `prompt` never changes."""
        text = fill(template, **values)
        given = self._count(template) + sum(
            self._count(value) * template.count(f"{{{name}}}") for name, value in values.items()
        )
        if self._count(text) > given:
            text = fill(template, **{n: v if n == "prompt" else f" {v} " for n, v in values.items()})
        return text

    def _count(self, text: str) -> int:
        return len(self._pattern.findall(text)) if self._pattern else 0


def answer_text(prompt: Any, completion: Any, *, opens_thinking: bool) -> str:
    """
    The text of a completion, thinking removed.

    Args:
        prompt: Its prompt, if known. A string that ends with `<think>` has opened a block of thinking.
        completion: A string, or a conversation whose last assistant message counts.
        opens_thinking: Whether every prompt has.
    """
    opened = opens_thinking or (isinstance(prompt, str) and prompt.rstrip().endswith(THINK_OPEN))
    return strip_thinking(completion_text(completion), opened=opened)
