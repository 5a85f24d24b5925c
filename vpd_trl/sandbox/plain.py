"""
Plain data as bytes and back, for values that come out of a program that can't be trusted.

This module and `harness` run inside the sandbox, in a bare interpreter: they import the standard library alone.
"""

from __future__ import annotations


TYPE_CHECKING = False  # `typing` itself would cost every run a few milliseconds
if TYPE_CHECKING:
    from typing import Any


MAX_DEPTH = 200  # of nested containers; also what ends a container that holds itself
MAX_SAME_HASH = 64  # items of a set or keys of a dictionary

_CONTAINERS: tuple[tuple[Any, bytes], ...] = (
    (list, b"l"),
    (tuple, b"t"),
    (set, b"S"),
    (frozenset, b"Z"),
    (dict, b"d"),
)


def encode(value: Any) -> bytes:
    """
    A value of plain data as bytes: `None`, numbers, strings, bytes, lists, tuples, sets and dictionaries.

    An instance of a subclass becomes its base type's value, by that type's own methods: what it says of itself, its
    `==` above all, stays behind. Values with a `tolist` (NumPy) become what that returns.

    Raises:
        TypeError: If it holds anything else.
        ValueError: If it is nested more than 200 deep.
    """
    parts: list[bytes] = []
    _encode(value, parts, 0)
    return b"".join(parts)


def _encode(value: Any, parts: list[bytes], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"a value that is nested more than {MAX_DEPTH} deep")
    if value is None or value is True or value is False:
        parts.append({None: b"N", True: b"T", False: b"F"}[value])
    elif isinstance(value, int):
        parts.append(b"i%s;" % int.__format__(value, "x").encode())  # no limit on digits in base 16
    elif isinstance(value, float):
        parts.append(b"f%s;" % float.hex(value).encode())
    elif isinstance(value, complex):
        for part in (b"c", *(b"%s;" % float.hex(number).encode() for number in (value.real, value.imag))):
            parts.append(part)
    elif isinstance(value, str):
        data = str.encode(value, "utf-8", "surrogatepass")
        parts += (b"s%d:" % len(data), data)
    elif isinstance(value, (bytes, bytearray)):
        data = bytes(value)
        parts += (b"b%d:" % len(data), data)
    else:
        for base, tag in _CONTAINERS:
            if isinstance(value, base):
                items: Any = list(base.__iter__(value))
                parts.append(b"%s%d:" % (tag, len(items)))
                for item in items:
                    _encode(item, parts, depth + 1)
                    if base is dict:
                        _encode(dict.__getitem__(value, item), parts, depth + 1)
                return
        if not hasattr(type(value), "tolist"):
            raise TypeError(f"a value of type {type(value).__name__}")
        _encode(value.tolist(), parts, depth + 1)


def decode(data: bytes, containers: float = float("inf")) -> Any:
    """
    The value that `encode` made these bytes of.

    Args:
        data: The bytes.
        containers: Most containers in the value. An empty set takes 3 bytes here, and then 216 in memory.

    Raises:
        ValueError: If they are not such bytes, whatever else they are, or hold too many containers, or a set or
            dictionary of items with the same hash, which would take hours to build.
    """
    try:
        value, end = _decode(data, 0, 0, [containers])
    except (IndexError, KeyError, TypeError, OverflowError, UnicodeError) as error:
        raise ValueError("these bytes are not encoded data") from error
    if end != len(data):
        raise ValueError("these bytes hold more than one value")
    return value


def _decode(data: bytes, at: int, depth: int, left: list[float]) -> tuple[Any, int]:
    if depth > MAX_DEPTH + 1:
        raise ValueError("nested too deep")
    tag, at = data[at : at + 1], at + 1
    if tag in (b"N", b"T", b"F"):
        return {b"N": None, b"T": True, b"F": False}[tag], at
    if tag in (b"i", b"f", b"c"):
        end = data.index(b";", at)
        text = data[at:end].decode("ascii")
        if tag == b"i":
            return int(text, 16), end + 1
        if tag == b"f":
            return float.fromhex(text), end + 1
        imaginary = data.index(b";", end + 1)
        return complex(float.fromhex(text), float.fromhex(data[end + 1 : imaginary].decode("ascii"))), imaginary + 1
    colon = data.index(b":", at)
    count, at = int(data[at:colon]), colon + 1
    if not 0 <= count <= len(data) - at:
        raise ValueError("a length beyond the end")
    if tag == b"s":
        return data[at : at + count].decode("utf-8", "surrogatepass"), at + count
    if tag == b"b":
        return data[at : at + count], at + count
    left[0] -= 1
    if left[0] < 0:
        raise ValueError("too many containers")
    items = []
    for _ in range(2 * count if tag == b"d" else count):
        item, at = _decode(data, at, depth + 1, left)
        items.append(item)
    if tag == b"d":
        _check_hashes(items[::2])
        return dict(zip(items[::2], items[1::2], strict=True)), at
    if tag in (b"S", b"Z"):
        _check_hashes(items)
    return {b"l": list, b"t": tuple, b"S": set, b"Z": frozenset}[tag](items), at


def _check_hashes(items: list) -> None:
    counts: dict[int, int] = {}
    for item in items if len(items) > MAX_SAME_HASH else ():
        key = hash(item)
        counts[key] = counts.get(key, 0) + 1
        if counts[key] > MAX_SAME_HASH:
            raise ValueError("too many items with the same hash")
