"""A finished run's phase as GGUF: the answers of llama.cpp, and how much of the gain each type of file keeps.

    PYTHONPATH=LLAMA python tests/benchmarks/gguf_kept.py quickstart [--runs runs] [--stage PHASE] [--llama-cpp DIR]

LLAMA: the folder of llama-cpp-python, for the answers and for Q4_K_M (or llama.cpp's quantizer by --llama-cpp). Five
prompts are answered greedily by llama.cpp from the F16 file and by transformers in 32 bits from the merged folder; the
tokens that agree, from the first on, are counted. *Kept* is the value that `qcft export --gguf` prints.
"""

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path

from qcft import deliveries
from qcft.errors import QcftError
from qcft.events import Note, Watch

PROMPTS = (
    "Name three primary colors.", "Explain in one sentence why the sky is blue.", "¿Cuál es la capital de Francia?",
    "Escreva uma frase sobre o mar.", "Write a short poem about a cat who learns Spanish.",
)  # fmt: skip


def show(event: object) -> None:
    if isinstance(event, Note):
        print(f"  {event.text}", file=sys.stderr)


def common_starts(file: Path, folder: Path, tokens: int, threads: int) -> list[tuple[int, int]]:
    """For each prompt: how many tokens agree from the first on, and how many transformers' answer has."""
    import llama_cpp
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    theirs = llama_cpp.Llama(str(file), n_ctx=2048, n_threads=threads, verbose=False)
    found = []
    for text in PROMPTS:
        turns = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        if theirs.tokenize(prompt.encode(), add_bos=False, special=True) != ids:
            raise SystemExit(f"llama.cpp reads {text!r} as other tokens")
        with torch.no_grad():
            answer = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)[0, len(ids) :].tolist()
        other: list[int] = []
        theirs.reset()
        for token in theirs.generate(ids, temp=0.0, repeat_penalty=1.0):
            other.append(token)
            if len(other) == len(answer) or token in ends:
                break
        same = next((i for i, (a, b) in enumerate(zip(answer, other, strict=False)) if a != b), len(answer))
        print(f"{text}  {same} of {len(answer)} tokens\n    {tokenizer.decode(other, skip_special_tokens=True)!r}")
        found.append((same, len(answer)))
    theirs.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--stage", help="a phase; the last by default")
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--types", default="f16,q8_0,q4_k_m")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    watch, figures = Watch(show), {}
    with tempfile.TemporaryDirectory() as place:
        merged = deliveries.merge(given.run, None, given.runs, watch, phase=given.stage)
        for kind in given.types.split(","):
            where = Path(place) / kind
            how = deliveries.Elsewhere(kind, given.llama_cpp)
            try:
                found = deliveries.export(given.run, where, given.runs, watch, phase=given.stage, elsewhere=how)
            except QcftError as error:
                print(f"{kind}: not made: {error.message}")
                continue
            file, kept = Path(found["file"]), found["kept"]
            share = kept and kept["share"]
            loss = kept and kept["loss"]["value"]
            print(
                f"{kind}: {file.stat().st_size / 1e6:.0f} MB, kept {share}, NLL {loss} from live, {kept and kept['kl']}"
            )
            figures[f"kept {kind}"] = {"value": share, "unit": "share", "goal": None, "met": share is not None}
            if kind == "f16":
                agreed = common_starts(file, Path(merged["folder"]), given.tokens, given.threads)
                whole = sum(same == tokens for same, tokens in agreed)
                figures["equal answers"] = {"value": whole, "unit": "of 5", "goal": 5, "met": whole == 5}
        print(f"the merge, in NF4: kept {merged['kept'] and merged['kept']['share']}")
    print(json.dumps({"benchmark": "gguf_kept", "figures": figures, "machine": platform.platform()}))


if __name__ == "__main__":
    main()
