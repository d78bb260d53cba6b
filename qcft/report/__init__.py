"""Reports, built from artefacts only."""
