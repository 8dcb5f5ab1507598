"""Ways to damage a file: bytes, metadata, tensors; and whole files of other kinds."""

import copy
import io
import json
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from agl_trl.artifacts.files import SCHEMA_VERSION, canonical_json, save_tensors


ROUNDS = 4  # of every kind of damage to every kind of file


@dataclass
class Good:
    """A file as we write it, how it is read, and the folder with its damaged copies."""

    file: str
    content: bytes
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    load: Callable[[Path], Any]
    folder: Path

    def written(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> bytes:
        """The bytes of our own writer: everything is right about them, the checksum too, but what was passed."""
        path = self.folder / "written.safetensors"
        save_tensors(path, tensors, metadata)
        return path.read_bytes()

    def said(self, text: str) -> bytes:
        """Good tensors with any text as metadata."""
        return save(self.tensors, metadata={"agl": text})


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def header_size(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def flipped(content: bytes, draw: random.Random, low: int, high: int, count: int = 1) -> bytes:
    """Some bits flipped between two places, outside the name of the checksum: without it a file is as early ones were."""
    bad, name = bytearray(content), content.find(b"content_sha256")
    places = [place for place in range(low, high) if not name <= place < name + 14]
    for place in draw.sample(places, count):
        bad[place] ^= 1 << draw.randrange(8)
    return bytes(bad)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"\x80\x04.")
    return buffer.getvalue()


def pickled(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"agl": Payload(marker)}, buffer)
    return buffer.getvalue()


# Files that are not ours, or not any more what was written: any loader must refuse them.
Damage = Callable[[Good, random.Random], bytes]
BYTES: dict[str, Damage] = {
    "truncated": lambda good, draw: good.content[: draw.randrange(len(good.content))],
    "truncated header": lambda good, draw: good.content[: draw.randrange(header_size(good.content))],
    "one byte short": lambda good, draw: good.content[:-1],
    "bytes appended": lambda good, draw: good.content + draw.randbytes(draw.randrange(1, 50)),
    "huge header": lambda good, draw: (2 ** draw.randrange(28, 63)).to_bytes(8, "little") + good.content[8:],
    "empty header": lambda good, draw: bytes(8) + good.content[8:],
    "negative header": lambda good, draw: (
        (-draw.randrange(1, 99)).to_bytes(8, "little", signed=True) + good.content[8:]
    ),
    "header of another size": lambda good, draw: (
        (header_size(good.content) - 8 - draw.randrange(1, 200)).to_bytes(8, "little") + good.content[8:]
    ),
    "random bytes": lambda good, draw: draw.randbytes(draw.randrange(1, 5000)),
    "empty file": lambda good, draw: b"",
    "zeros": lambda good, draw: bytes(draw.randrange(1, 5000)),
    "pickle": lambda good, draw: pickled(good.folder / "marker"),
    "zip": lambda good, draw: zipped(),
    "gguf": lambda good, draw: b"GGUF" + (3).to_bytes(4, "little") + draw.randbytes(200),
    "web page": lambda good, draw: b"<!DOCTYPE html><html><body>404: not found</body></html>\n" * draw.randrange(1, 9),
    "LFS pointer": lambda good, draw: (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:"
        + draw.randbytes(32).hex().encode()
        + b"\nsize 1234\n"
    ),
    "brackets for a header": lambda good, draw: (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "of another program": lambda good, draw: save({"weight": torch.rand(draw.randrange(1, 9))}, {"format": "pt"}),
}
FLIPS: dict[str, Damage] = {
    "flip in the header": lambda good, draw: flipped(good.content, draw, 8, header_size(good.content)),
    "flip in the numbers": lambda good, draw: flipped(
        good.content, draw, header_size(good.content), len(good.content)
    ),
    "many flips": lambda good, draw: flipped(good.content, draw, 8, len(good.content), 20),
}


def with_version(good: Good, version: Any) -> bytes:
    return good.said(canonical_json({**good.metadata, "schema_version": version}))


def as_text(good: Good, **changes: Any) -> str:
    return json.dumps(
        {"schema_version": SCHEMA_VERSION, **good.metadata, **changes}, sort_keys=True, separators=(",", ":")
    )


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


METADATA: dict[str, Damage] = {
    "cut JSON": lambda good, draw: good.said(as_text(good)[: draw.randrange(len(as_text(good)))]),
    "no JSON": lambda good, draw: good.said(draw.choice(["", "agl", "{'a': 1}", "\x00", "﻿{}", "{}{}"])),
    "no mapping": lambda good, draw: good.said(draw.choice(["[]", "3", "null", '"fisher"', "true", "{}", "[{}]"])),
    "no version": lambda good, draw: good.said(canonical_json(good.metadata)),
    "version": lambda good, draw: with_version(
        good, draw.choice([SCHEMA_VERSION + 1, 99, True, 1.0, 0.5, -1, 0, "1", "x" * 999, None, [1], {}, 10**400])
    ),
    "NaN": lambda good, draw: good.said(as_text(good, seed=draw.choice([torch.nan, torch.inf, -torch.inf]))),
    "number beyond floats": lambda good, draw: good.said(as_text(good).replace('"kind"', '"a":1e999,"kind"', 1)),
    "number beyond Python": lambda good, draw: good.said(as_text(good).replace("{", '{"a":' + "9" * 5000 + ",", 1)),
    "huge numbers": lambda good, draw: good.written(
        good.tensors, replace_number(good.metadata, draw, draw.choice([10**400, -(10**400), 1e308]))
    ),
    "key twice": lambda good, draw: good.said(as_text(good).replace("{", '{"kind":"other",', 1)),
    "deep": lambda good, draw: good.said(nested(100_000)),
    "deep inside": lambda good, draw: good.said(
        as_text(good).replace("{", '{"a":' + nested(draw.choice([12, 400, 900, 100_000])) + ",", 1)
    ),
    "lone surrogate": lambda good, draw: good.said(as_text(good).replace("{", '{"a":"\\ud800",', 1)),
    "spaces": lambda good, draw: good.said(json.dumps({"schema_version": SCHEMA_VERSION, **good.metadata}, indent=1)),
    "other kind": lambda good, draw: good.written(
        good.tensors, good.metadata | {"kind": draw.choice(["other", "", None, 1, [], "fisher "])}
    ),
    "key gone": lambda good, draw: good.written(
        good.tensors, without(good.metadata, draw.choice([key for key in REQUIRED if key in good.metadata]))
    ),
    "layer name": lambda good, draw: good.written(*renamed(good, draw.choice(NAMES))),
    "checksum of other content": lambda good, draw: good.said(as_text(good, content_sha256=draw.randbytes(32).hex())),
    "checksum of another type": lambda good, draw: good.said(
        as_text(good, content_sha256=draw.choice([1, True, [], "", {}]))
    ),
}
REQUIRED = ("kind", "shrinkage", "input_of", "shapes", "base_model", "seed", "layers", "summary", "adapter_sha256")
REQUIRED += ("budget_multiplier", "global_step", "scaling", "kinds", "pad_token_id")
NAMES = ("../../etc/passwd", "<script>alert(1)</script>", "a\nb", "$x^$", "", "x" * 400, "\x1b[31m", "a|b", "`x`")


def replace_number(metadata: dict[str, Any], draw: random.Random, number: float) -> dict[str, Any]:
    """Metadata with one of the numbers that mean something replaced."""
    changed = copy.deepcopy(metadata)
    if "shapes" in changed:
        where = draw.choice([changed, *changed["shapes"].values()])
        where["shrinkage" if where is changed else 0] = number
    elif "scaling" in changed:
        changed["scaling"][min(changed["scaling"])] = 10**400
    elif "kinds" in changed:
        changed["pad_token_id"] = -abs(number)
    else:
        changed[draw.choice(["global_step", "budget_multiplier"])] = -abs(number)
    return changed


def without(mapping: dict, key: str) -> dict:
    return {name: value for name, value in mapping.items() if name != key}


def renamed(good: Good, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The first layer, or protected behaviour, under another name, consistently."""
    layers = good.metadata.get("layers") or good.metadata.get("kinds")
    layers = layers or [*(good.metadata.get("shapes") or good.metadata["scaling"])]

    def change(value: Any) -> Any:
        if isinstance(value, dict):
            return {change(key): change(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [change(inner) for inner in value]
        return name if value == layers[0] else value

    return {key.replace(layers[0], name): t for key, t in good.tensors.items()}, change(good.metadata)


OTHER_DTYPES = (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8)


def with_tensor(good: Good, draw: random.Random, change: Callable[[Tensor], Tensor | None], among: str = "") -> bytes:
    """Written with one of the tensors changed, or left out; the name of one that matters holds `among`."""
    names = [name for name in sorted(good.tensors) if among in name and not name.startswith("history.")]
    name = draw.choice([name for name in names if good.tensors[name].is_floating_point()])
    tensors = without(good.tensors, name)
    if (changed := change(good.tensors[name])) is not None:
        tensors[name] = changed
    return good.written(tensors, good.metadata) if good.metadata else save(tensors)


TENSORS: dict[str, Damage] = {
    "type": lambda good, draw: with_tensor(good, draw, lambda t: t.to(draw.choice(OTHER_DTYPES))),
    "longer": lambda good, draw: with_tensor(good, draw, lambda t: torch.cat([t.reshape(-1), torch.ones(1).to(t)])),
    "another dimension": lambda good, draw: with_tensor(good, draw, lambda t: t[None]),
    "empty tensor": lambda good, draw: with_tensor(good, draw, lambda t: t.new_zeros(0)),
    "missing tensor": lambda good, draw: with_tensor(good, draw, lambda t: None),
}
OUTLIER = {"NaN": torch.nan, "infinity": torch.inf, "minus infinity": -torch.inf}


def spoiled(tensor: Tensor, value: float, draw: random.Random) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[draw.randrange(changed.numel())] = value
    return changed


def outliers(among: str, **more: float) -> dict[str, Damage]:
    def damage(value: float) -> Damage:
        return lambda good, draw: with_tensor(good, draw, lambda t: spoiled(t, value, draw), among)

    return {f"{name} in {among or 'any'}": damage(value) for name, value in {**OUTLIER, **more}.items()}


CURVES: tuple[Any, ...] = (
    {},
    "curve",
    {"drifts": [1e-3], "kl": [[0.1]]},
    {"drifts": [1e-3, 1e-3], "kl": [[0.1, 0.2]]},
    {"drifts": [0.0, 1e-3], "kl": [[0.1, 0.2]]},
    {"drifts": [1e-3, 1e300], "kl": [[0.1, 0.2]]},
    {"drifts": [1e-3, 1e-2], "kl": []},
    {"drifts": [1e-3, 1e-2], "kl": [[0.1, 0.2], [0.1]]},
    {"drifts": [1e-3, 1e-2], "kl": [[-1.0, 0.2]]},
    {"drifts": [1e-3, 1e-2], "kl": [[0.1, 1e200]]},
)
FISHER_ONLY: dict[str, Damage] = {
    **outliers("inputs"),
    **outliers("outputs"),
    **outliers("weight_norm", negative=-1.0, zero=0.0),
    **outliers("eigenvalues", negative=-1.0),
    "rising eigenvalues": lambda good, draw: with_tensor(good, draw, lambda t: t.flip(0), "eigenvalues"),
    **outliers("remainder", negative=-1.0),
    **outliers("eigenvectors", stretched=3.0),
    "extra tensor": lambda good, draw: good.written({**good.tensors, "more": torch.rand(2)}, good.metadata),
    "drift inside": lambda good, draw: good.written(good.tensors, good.metadata | {"kind": "drift"}),
    "no tokens": lambda good, draw: good.written(
        good.tensors | {"num_tokens": draw.choice([torch.tensor(0), torch.tensor(1.5), torch.ones(2)])}, good.metadata
    ),
    "shapes of others": lambda good, draw: good.written(
        good.tensors, good.metadata | {"shapes": {name: [draw.randrange(99), 7] for name in good.metadata["shapes"]}}
    ),
    "curve of KL": lambda good, draw: good.written(good.tensors, good.metadata | {"kl_curve": draw.choice(CURVES)}),
    "input of nobody": lambda good, draw: good.written(
        good.tensors, good.metadata | {"input_of": dict.fromkeys(good.metadata["input_of"], "nobody")}
    ),
}
DRIFT_ONLY: dict[str, Damage] = {
    **outliers("relative_drift", negative=-1.0),
    **outliers("energy", negative=-1.0),
    **outliers("overlap"),
    **outliers("ability.notes", negative=-1.0),
    "flags of abilities": lambda good, draw: good.written(
        good.tensors
        | {"ability.arc_easy.raw_base": draw.choice([torch.rand(2), torch.ones(3).bool(), torch.ones(2, 1).bool()])},
        good.metadata,
    ),
    "no flags of abilities": lambda good, draw: good.written(
        without(good.tensors, draw.choice(["ability.arc_easy.base", "ability.arc_easy.raw_tuned"])), good.metadata
    ),
    "no abilities": lambda good, draw: good.written(good.tensors, without(good.metadata, "abilities")),
    "ability twice": lambda good, draw: good.written(
        good.tensors,
        good.metadata | {"abilities": [*good.metadata["abilities"], draw.choice(good.metadata["abilities"])]},
    ),
    "ability of nobody": lambda good, draw: good.written(
        good.tensors,
        good.metadata
        | {"abilities": [*good.metadata["abilities"], {"name": draw.choice(["x", "../x", ""]), "kind": "text"}]},
    ),
    "extra tensor": lambda good, draw: good.written({**good.tensors, "more": torch.rand(2)}, good.metadata),
    "fisher inside": lambda good, draw: good.written(good.tensors, good.metadata | {"kind": "fisher"}),
    "layer twice": lambda good, draw: good.written(
        good.tensors, good.metadata | {"layers": [good.metadata["layers"][0]] * len(good.metadata["layers"])}
    ),
    "layer more": lambda good, draw: good.written(
        good.tensors, good.metadata | {"layers": [*good.metadata["layers"], "x"]}
    ),
    "no layers": lambda good, draw: good.written(good.tensors, good.metadata | {"layers": []}),
    "no answers": lambda good, draw: good.written(good.tensors, without(good.metadata, "behaviour")),
    "history": lambda good, draw: good.written(
        good.tensors | {"history.loss": draw.choice([torch.rand(9), torch.rand(3, 3), torch.ones(3).bool()])},
        good.metadata,
    ),
    "hash": lambda good, draw: good.written(
        good.tensors, good.metadata | {"adapter_sha256": draw.choice(["", "AB" * 32, "../x", "ab" * 31])}
    ),
}


def with_integers(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    """Written with one of the tensors of whole numbers changed."""
    return lambda good, draw: good.written(good.tensors | {name: change(good.tensors[name])}, good.metadata)


def at(place: tuple[int, ...], value: int) -> Callable[[Tensor], Tensor]:
    """A tensor with another number at one place."""
    return lambda tensor: tensor.index_put(tuple(torch.tensor(place)), torch.tensor(value).to(tensor))


ANSWERS_ONLY: dict[str, Damage] = {
    **outliers("log_probs", certain=0.3),
    "row without an answer": with_integers("answer_starts", at((1,), 10**6)),
    "row without a prompt": with_integers("answer_starts", at((1,), 0)),
    "rows of other lengths": with_integers("lengths", at((0,), 7)),
    "negative token": with_integers("input_ids", at((3,), -1)),
    "negative next token": with_integers("tokens", at((2, 1), -1)),
    "wide tokens": with_integers("input_ids", lambda t: t.long()),
    "tokens in one row": with_integers("tokens", lambda t: t.reshape(-1)),
    "no next tokens": with_integers("tokens", lambda t: t[:, :0]),
    "extra tensor": lambda good, draw: good.written({**good.tensors, "more": torch.rand(2)}, good.metadata),
    "fisher inside": lambda good, draw: good.written(good.tensors, good.metadata | {"kind": "fisher"}),
    "no rows": lambda good, draw: good.written(
        {name: tensor[:0] for name, tensor in good.tensors.items()}, good.metadata | {"kinds": []}
    ),
    "kind more": lambda good, draw: good.written(
        good.tensors, good.metadata | {"kinds": [*good.metadata["kinds"], "x"]}
    ),
}
OURS = BYTES | FLIPS | METADATA | TENSORS
DAMAGES: dict[str, dict[str, Damage]] = {
    "fisher": {**OURS, **FISHER_ONLY},
    "drift": {**OURS, **DRIFT_ONLY},
    "answers": {**OURS, **ANSWERS_ONLY},
    "reference": {**OURS, **outliers("")},
    "adapter": {**BYTES, **TENSORS, **outliers("")},
}
