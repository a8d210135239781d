"""What a release of `transformers` makes of exports: python scripts/load_export.py EXPECTED.json, by check_export.py.

Knows `torch` and `transformers` alone, so that it runs where nothing of this project is installed. Writes one JSON
object a line: for every export whether its tokens are those of training, its loss, and its likeliest text.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__


@torch.no_grad()
def load(directory: str, expected: dict[str, Any]) -> dict[str, Any]:
    """``expected``: texts, the windows of tokens that training cuts from them, a prompt and how much to add to it."""
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, trust_remote_code=False).eval()
    stream = [token for text in expected["texts"] for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    length, number = tokenizer.model_max_length, len(expected["windows"])
    windows = [stream[at : at + length + 1] for at in range(0, number * length, length)]
    inputs = torch.tensor(windows)
    logits = model(inputs[:, :-1]).logits.double()
    loss = cross_entropy(logits.flatten(0, 1), inputs[:, 1:].flatten())
    prompt = tokenizer(expected["prompt"], return_tensors="pt")
    added = model.generate(**prompt, max_new_tokens=expected["added"], do_sample=False)[0]
    return {
        "transformers": __version__,
        "same_tokens": windows == expected["windows"],
        "loss": float(loss),
        "text": tokenizer.decode(added, skip_special_tokens=True),
    }


if __name__ == "__main__":
    for name, expected in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")).items():
        print(json.dumps({"name": name} | load(expected["directory"], expected)), flush=True)
