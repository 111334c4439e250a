"""Headless Chromium and node, where they are installed, for the tests of the HTML pages."""

import shutil
import subprocess

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
NODE = shutil.which("node")


def dump_dom(url, folder, timeout=120):
    """The document as Chromium holds it after its scripts ran. Skips without Chromium."""
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update"]
    command += [f"--user-data-dir={folder}/chromium", "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run([*command, url], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_node(code, timeout=60):
    """What JavaScript prints in node. Skips without node."""
    if NODE is None:
        pytest.skip("no node is installed")
    done = subprocess.run([NODE, "-"], input=code, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout
