"""A sentence encoder made on the spot."""

import json
from pathlib import Path

import numpy as np


def static_encoder(folder: Path, tokenizer_folder: Path, seed: int = 0) -> Path:
    """A folder in model2vec's format, with a vector of its own for each token."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    vectors = np.random.default_rng(seed).normal(size=(tokenizer.get_vocab_size(), 12)).astype(np.float32)
    save_file({"embeddings": vectors}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"normalize": True}))
    return folder
