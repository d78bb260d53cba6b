"""Scores computed by hand."""

import numpy as np
import torch

from qcft.data.encode import IGNORED


def by_hand(model, row):
    """NLL of a row's answer tokens, alone, from the full logits, by numpy in fp64."""
    with torch.no_grad():
        logits = model(torch.tensor([row.input_ids])).logits[0].float().numpy().astype(np.float64)
    answered = [t for t, label in enumerate(row.labels) if t and label != IGNORED]
    chances = [np.exp(logits[t - 1] - logits[t - 1].max()) for t in answered]
    nll = -sum(np.log(p[row.input_ids[t]] / p.sum()) for t, p in zip(answered, chances, strict=True))
    return float(nll), len(answered)
