"""Hook of MkDocs: a link out of docs/, which only the repository has, becomes the file's name."""

import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links from *page* that leave docs/, as text."""
    depth = page.file.src_uri.count("/") + 1
    leaves = re.compile(rf"\[([^\]]+)\]\((?:\.\./){{{depth}}}([\w./-]+)\)")
    return leaves.sub(lambda link: f"{link[1]} (`{link[2]}`)", markdown)
