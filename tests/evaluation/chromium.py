"""A page of ours in a real Chromium, loaded from file://."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1000",
    "--virtual-time-budget=3000",
)

needs_chromium = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: the report is not tested in a browser"),
]


def browse(page: Path, address: str, tmp_path: Path, script: str = "") -> tuple[dict[str, Any], str]:
    """Load the page, run `script` in it, and return `out` of the script and the document."""
    target = page
    if script:
        # Beside the page, so that its relative links hold; the policy of the page admits only scripts with its nonce.
        source = page.read_text(encoding="utf-8")
        nonce = re.search(r'<script nonce="([0-9a-f]+)">', source)
        assert nonce
        hook = (
            f'<script nonce="{nonce[1]}">const press = key => document.activeElement.dispatchEvent('
            "new KeyboardEvent('keydown', {key, bubbles: true, cancelable: true}));"
            "const cards = () => [...document.querySelectorAll('.card')].map(card => Number(card.dataset.prompt));"
            "const wait = milliseconds => new Promise(done => setTimeout(done, milliseconds));"
            # Cards are filled when they come near the window, which takes as many frames as the machine is busy.
            "const until = async met => { for (let n = 0; n < 40 && !met(); n++) await wait(50); };"
            f"(async () => {{ const out = {{}}; await wait(200); {script};"
            "document.body.dataset.out = JSON.stringify(out); })();"
            "</script></body>"
        )
        target = page.with_name("hooked.html")
        target.write_text(source.replace("</body>", hook), encoding="utf-8")
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([*command, f"{target.as_uri()}{address}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r'<body[^>]* data-out="([^"]*)"', done.stdout)
    assert found or not script, done.stdout[:500] + done.stderr[-2000:]
    return (json.loads(html.unescape(found[1])) if found else {}), done.stdout


def card_order(document: str) -> list[int]:
    return [int(number) for number in re.findall(r'<article class="card" data-prompt="(\d+)"', document)]
