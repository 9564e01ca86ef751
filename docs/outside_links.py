"""Hook of mkdocs: a link to a file of the repository outside docs/ has no page on the site, so its text stays and names the file."""

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **context: Any) -> str:
    """The page with such links as text."""
    return OUTSIDE.sub(lambda link: link[1] if link[1].endswith(link[2]) else f"{link[1]} (`{link[2]}`)", markdown)
