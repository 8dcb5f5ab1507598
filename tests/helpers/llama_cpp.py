"""llama.cpp's own server with models of the embedded world, on a free port of this machine."""

from pathlib import Path
from typing import Any

import xllamacpp

from agl_trl.miniworld import load_model, load_tokenizer
from tests.helpers.gguf_model import write_gguf


def llama_cpp_server(folder: Path, name: str) -> Any:
    """
    A server of one of the embedded checkpoints, under its name; `listening_address` is where. It ends when it is forgotten.

    Args:
        folder (`Path`):
            Where the GGUF goes.
        name (`str`):
            Name of the checkpoint.
    """
    params = xllamacpp.CommonParams()
    params.model.path = str(write_gguf(load_model(name), load_tokenizer(), folder / f"{name}.gguf"))
    params.model_alias = {name}
    params.port, params.n_ctx, params.n_parallel, params.verbosity = 0, 1024, 4, 0
    params.cpuparams.n_threads, params.use_jinja, params.warmup = 1, True, False
    return xllamacpp.Server(params)
