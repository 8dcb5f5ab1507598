"""What a commit of the local Hub holds."""

import hashlib
import json

from safetensors import safe_open


def described(data: bytes, path) -> dict:
    """The `agl` metadata of a safetensors file given as bytes."""
    path.write_bytes(data)
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["agl"])


def agreeing_folders(commit, scratch) -> dict[str, int]:
    """Step of the report in every folder of a commit that holds an adapter; each is of the adapter beside it."""
    steps = {}
    for name, blob in commit.files.items():
        if name.endswith("adapter_model.safetensors"):
            folder = name.removesuffix("adapter_model.safetensors")
            report = described(commit.files[f"{folder}agl/drift.safetensors"].data, scratch)
            assert report["adapter_sha256"] == hashlib.sha256(blob.data).hexdigest(), (commit.title, folder)
            assert f"{folder}agl/fisher.safetensors" in commit.files
            assert f"{folder}agl/drift.png" in commit.files
            steps[folder] = report["global_step"]
    assert steps or commit.parent is None
    return steps
