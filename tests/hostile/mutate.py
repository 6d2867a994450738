"""Inputs made wrong: trees of values with something hostile in them, bytes with some of them moved.

Everything follows from a random.Random: the same seed gives the same inputs.
"""

import copy
import json
import random
from typing import Any

HUGE = 10**30
NAMES = ("../../escape", "/etc/passwd", "a/../../b", "\0", "", "con\ncat", "é" * 300, "__class__")


def deep(levels: int) -> Any:
    """A list within lists."""
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def hostile(draw: random.Random) -> Any:
    """A value that a reader may not have thought of."""
    return draw.choice([
        lambda: None, lambda: True, lambda: -1, lambda: 0, lambda: HUGE, lambda: -HUGE,
        lambda: 2**63, lambda: 2**31 - 1, lambda: 1.5, lambda: float("nan"), lambda: float("inf"),
        lambda: -float("inf"), lambda: 1e308, lambda: "", lambda: "x" * 5000, list,
        dict, lambda: [[]], lambda: {"": {}}, lambda: deep(60), lambda: draw.choice(NAMES),
        lambda: "1e9999", lambda: [HUGE] * 3, lambda: {"a": deep(30)}, lambda: "cos\nsystem",
        lambda: [-1, 5], lambda: [5, 1], lambda: "F32", lambda: draw.randrange(-10, 10**6),
    ])()  # fmt: skip


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(
            node, list) else ()  # fmt: skip
        for key in keys:
            found.append((node, key))
            waiting.append(node[key])
    return found


def change(tree: Any, draw: random.Random) -> Any:
    """A copy with one to three places replaced, removed, renamed, added or doubled."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.choice((1, 1, 2, 3))):
        spots = places(tree)
        if not spots:
            return hostile(draw)
        node, key = draw.choice(spots)
        kind = draw.choice(("replace", "replace", "replace", "remove", "rename", "add", "swap"))
        if kind == "replace":
            node[key] = hostile(draw)
        elif kind == "remove":
            del node[key]
        elif kind == "rename" and isinstance(node, dict):
            node[draw.choice(NAMES)] = node.pop(key)
        elif kind == "add" and isinstance(node, dict):
            node[draw.choice(NAMES)] = hostile(draw)
        else:
            other, place = draw.choice(spots)
            if isinstance(other, list | dict) and (isinstance(other, dict) or place < len(other)):
                try:
                    node[key] = copy.deepcopy(other[place])
                except (KeyError, IndexError):
                    node[key] = None
    return tree


def text_of(tree: Any, draw: random.Random) -> bytes:
    """A tree as JSON, now and then with a key twice or nesting beyond any parser's patience."""
    text = json.dumps(tree)
    if draw.random() < 0.05:
        text = text.replace("{", '{"twice": 1, "twice": 2, ', 1)
    if draw.random() < 0.05:
        levels = draw.choice((500, 100_000))
        text = draw.choice((text[:-1] + ', "deep": ', "")) + "[" * levels + "]" * levels
    if draw.random() < 0.02:
        text = text.replace("1", "1" * 5000)
    return text.encode(errors="surrogatepass")


def scramble(data: bytes, draw: random.Random) -> bytes:
    """Bytes with some cut off, flipped, doubled or thrown in."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = draw.randrange(len(changed) + 1)
        kind = draw.choice(("cut", "flip", "flip", "insert", "double", "zero"))
        if kind == "cut":
            del changed[place:]
        elif kind == "flip" and place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == "insert":
            changed[place:place] = draw.randbytes(draw.choice((1, 4, 64)))
        elif kind == "double":
            changed[place:place] = changed[place : place + draw.randrange(1, 200)]
        elif kind == "zero":
            length = draw.choice((1, 8))
            changed[place : place + length] = bytes([draw.choice((0, 255))]) * length
    return bytes(changed)
