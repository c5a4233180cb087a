"""Check prompts: which texts a text encoder accepts. Torch-free."""

import re
from typing import Any

MAX_CHARACTERS = 10_000
"""Most characters in a prompt; text encoders truncate far earlier, at 77 to 512 tokens."""
INVALID_CHARACTER = re.compile("[\0\ud800-\udfff]")
"""Characters that tokenizers reject or cut at: NUL, and surrogates, which are not valid Unicode by themselves."""


def check_prompt(name: str, prompt: Any) -> None:
    """Raise TypeError unless `prompt` is a str, and ValueError if it is too long or holds an invalid character."""
    if not isinstance(prompt, str):
        raise TypeError(f"{name}: got {type(prompt).__name__} {prompt!r:.60}; expected a string")
    if len(prompt) > MAX_CHARACTERS:
        raise ValueError(f"{name}: got {len(prompt)} characters; expected at most {MAX_CHARACTERS}")
    if found := INVALID_CHARACTER.search(prompt):
        got = f"{found[0]!r} at character {found.start() + 1}"
        raise ValueError(f"{name}: got {got}, which no tokenizer takes; expected valid Unicode without NUL")
