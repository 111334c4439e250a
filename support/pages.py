"""Self-contained HTML pages: a template of this folder and its script, what all pages share
(pages.html, the head; pages.css; pages.js, the script's beginning), and data as JSON.

A page shows text that a model or a world wrote, so nothing in it may run. The data stands in a
script element of type application/json in which every `<` is written \\u003c, so it cannot end the
element. The page's own script shows it through textContent. A content security policy allows that
one script, by its hash, and no request at all.
"""

import base64
import hashlib
import json
import math
from pathlib import Path

HERE = Path(__file__).parent


def write_page(path, template, data):
    """Write `template` (NAME.html of this folder, whose script is NAME.js) with `data` to `path`.

    data: what JSON can hold; numbers that are not finite become null. OSError where the file
    cannot be written.
    """
    page = _read(template)
    page = page.replace("{{HEAD}}", _read("pages.html")).replace("{{STYLE}}", _read("pages.css"))
    script = _read("pages.js") + _read(template.replace(".html", ".js"))
    page = page.replace("<script></script>", f"<script>{script}</script>")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = page.replace("{{HASH}}", digest)
    before, after = page.split("{{DATA}}")
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(before + as_json(data) + after, encoding="utf-8")
    temporary.replace(path)


def _read(name):
    return (HERE / name).read_text(encoding="utf-8")


def as_json(data):
    """JSON that may stand inside a script element."""
    text = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _finite(x):
    if isinstance(x, dict):
        return {str(key): _finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
