"""What runs leave, to be compared."""

from qcft.files import read_json

GENERATIVE = {"ratio": 0.2, "max_new_tokens": 24, "temperature": 1.0, "chunk": 4}


def results(runs):
    """The files of each stage of a run, with their digests; but for an adapter's config, which names a folder."""
    stages = read_json(runs / "tiny" / "run.json")["stages"]
    files = {stage: read_json(runs / ".steps" / step / "done.json")["files"] for stage, step in stages.items()}
    return {stage: {k: v for k, v in f.items() if k != "adapter/adapter_config.json"} for stage, f in files.items()}
