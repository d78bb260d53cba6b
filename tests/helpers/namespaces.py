"""Mounts of a test's own, which some systems do not allow."""

import subprocess

import pytest


def skip_without_namespaces():
    """Skip the test where `unshare -rm` does not work, with what it says."""
    tried = subprocess.run(["sh", "-c", "unshare -rm true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"unshare -rm fails here: {tried.stderr.strip()}")
