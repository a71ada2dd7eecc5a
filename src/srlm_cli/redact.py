"""Texts without the secrets in them: user and password of a URL, and the key of a server."""

from __future__ import annotations

import os
import re

CREDENTIALS = re.compile(r"(?<=://)[^\s/?#]*@")
SECRET_FIELD = re.compile(r"(?<=[?&])((?:api[-_]?|access[-_]?)?(?:key|token)|sig)=[^&#\s]+", re.IGNORECASE)
SHORTEST_KEY = 8  # a shorter one is a placeholder such as EMPTY, and a part of other words


def redacted(text: str) -> str:
    """Return a text for a terminal or a file: `***` in place of each secret."""
    text = SECRET_FIELD.sub(r"\1=***", CREDENTIALS.sub("***@", text))
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    return text.replace(key, "***") if len(key) >= SHORTEST_KEY else text
