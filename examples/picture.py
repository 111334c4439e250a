"""Make docs/viewer.png from the example agent: `python examples/picture.py` (needs Chromium).

It plays the 300 unseen tasks, writes the page, and takes its picture at the episode whose subgoals'
advantages differ most.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main():
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"error: none of {', '.join(BROWSERS)} is installed")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "episodes.html"
        words = ["eval.py", "examples/household", "--html", str(page)]
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        words += [f"--user-data-dir={folder}/browser", "--virtual-time-budget=3000"]
        words += [f"--screenshot={ROOT}/docs/viewer.png", "--window-size=1280,860"]
        link = f"{page.as_uri()}#episode={chosen(page)}&turn=0"
        subprocess.run([browser, *words, link], check=True, capture_output=True)
    print("docs/viewer.png")


def chosen(page):
    """The episode with the largest difference between its subgoals' advantages, all turns valid."""
    text = page.read_text(encoding="utf-8")
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    episodes = json.loads(data[1])["episodes"]

    def contrast(episode):
        if any(turn["error"] for turn in episode["turns"]):
            return 0.0
        rated = [turn["raw"]["o"] for turn in episode["turns"] if "o" in turn["raw"]]
        return max(rated) - min(rated)

    return max(range(len(episodes)), key=lambda n: contrast(episodes[n]))


if __name__ == "__main__":
    main()
