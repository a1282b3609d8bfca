"""onnxruntime-genai and its own loop."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime_genai
from _serve import Opened, Task, decoded, serve


def decoder(task: Task) -> Opened:
    """Open a decoder that the model builder made."""
    file = Path(task["model"]) / "genai_config.json"
    given = json.loads(file.read_text(encoding="utf-8"))
    given["model"]["decoder"]["session_options"]["intra_op_num_threads"] = task["threads"]
    file.write_text(json.dumps(given, indent=2), encoding="utf-8")
    model = onnxruntime_genai.Model(task["model"])
    params = onnxruntime_genai.GeneratorParams(model)
    length = len(task["prompt"]) + task["new_tokens"] + 1
    params.set_search_options(do_sample=False, max_length=length, min_length=length)
    held: list[onnxruntime_genai.Generator] = []

    def write(_: int) -> int:
        held[0].generate_next_token()
        return int(held[0].get_next_tokens()[0])

    def read(ids: list[int]) -> int:
        held[:] = [onnxruntime_genai.Generator(model, params)]
        held[0].append_tokens(ids)
        return write(0)

    return decoded(read, write, task)


if __name__ == "__main__":
    serve({"decoder": decoder}, ("onnxruntime-genai", "onnxruntime"))
