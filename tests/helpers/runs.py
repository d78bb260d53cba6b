"""What runs leave, to be compared."""

from qcft.files import file_digest, read_json, read_sealed, write_sealed

GENERATIVE = {"ratio": 0.2, "max_new_tokens": 24, "temperature": 1.0, "chunk": 4}


def results(runs):
    """The files of each stage of a run, with their digests; but for an adapter's config, which names a folder."""
    stages = read_json(runs / "tiny" / "run.json")["stages"]
    files = {stage: read_json(runs / ".steps" / step / "done.json")["files"] for stage, step in stages.items()}
    return {stage: {k: v for k, v in f.items() if k != "adapter/adapter_config.json"} for stage, f in files.items()}


def seal_again(step):
    """Have a step's done.json list its files as they are now, as if they had been written so."""
    record = read_sealed(step / "done.json")
    record["files"] = {name: file_digest(step / name) for name in record["files"]}
    if "log" in record:
        record["log"] = file_digest(step / "log.jsonl")
    write_sealed(step / "done.json", record)
