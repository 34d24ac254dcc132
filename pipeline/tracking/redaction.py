"""From text that is about to leave the machine to the same text without credentials."""

import re

PLACEHOLDER = "***"
USERINFO = re.compile(r"(?<=://)[^/\s@\"']+@")
"""`user:password@` of a URL."""
QUERY_SECRET = re.compile(
    r"([?&][\w-]*(?:token|secret|password|signature|credential|api_?key|access_?key)[\w-]*=)"
    r"[^&\s\"']+",
    re.IGNORECASE,
)
"""A secret given as a URL query parameter, as in a signed link."""
KNOWN_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AKIA[0-9A-Z]{16})\b"
)
"""Tokens that their issuers make recognisable: Hugging Face, OpenAI style, GitHub, AWS."""


def redact(text: str) -> str:
    """Give the text with the credentials of URLs and recognisable tokens replaced by `***`."""
    text = USERINFO.sub(f"{PLACEHOLDER}@", text)
    text = QUERY_SECRET.sub(rf"\1{PLACEHOLDER}", text)
    return KNOWN_TOKENS.sub(PLACEHOLDER, text)
