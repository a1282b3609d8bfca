"""llama.cpp by its C API, as llama-cpp-python binds it: nothing of Python between the steps."""

from __future__ import annotations

import llama_cpp
import numpy as np
from _serve import Opened, Task, decoded, serve


def decoder(task: Task) -> Opened:
    """Open a GGUF."""
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        task["model"].encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise RuntimeError(f"{task['model']} cannot be loaded: see the log")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = len(task["prompt"]) + task["new_tokens"] + 1
    params.n_threads = params.n_threads_batch = task["threads"]
    context = llama_cpp.llama_init_from_model(model, params)
    words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    memory = llama_cpp.llama_get_memory(context)

    def step(ids: list[int]) -> int:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        batch = llama_cpp.llama_batch_get_one(tokens, len(ids))  # logits of the last one only
        if status := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode gave {status}")
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, (words,)).argmax())

    def read(ids: list[int]) -> int:
        llama_cpp.llama_memory_clear(memory, True)
        return step(ids)

    return decoded(read, lambda token: step([token]), task)


if __name__ == "__main__":
    serve({"decoder": decoder}, ("llama-cpp-python",))
