"""Reports: read from artefacts only."""
