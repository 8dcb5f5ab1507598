"""Where a continued adapter started: kept bit for bit, measured from, and refused where it is of other layers."""

import pytest
import torch

from agl_trl.artifacts.files import ArtifactError, load_tensors, save_tensors
from agl_trl.modeling.lora import AdaptedLayer, adapted_layers
from agl_trl.modeling.reference_factors import REFERENCE_FILE, load_reference, save_reference
from tests.helpers.models import adapted


@pytest.fixture
def continued() -> list[AdaptedLayer]:
    """Layers of an adapter that had moved before, and moved on."""
    layers = [layer.with_reference() for layer in adapted_layers(adapted(0.3))]
    generator = torch.Generator().manual_seed(2)
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        layer.module.scaling["default"] *= 1.5
    return layers


def test_movement_is_the_difference_of_the_products(continued):
    """`ΔW = sBA − s₀B₀A₀` in float64, though no factor of rank 2r is ever multiplied out."""
    for layer in continued:
        (A, B, s), (A0, B0, s0) = layer.current(), layer.reference
        expected = s * B.double() @ A.double() - s0 * B0.double() @ A0.double()
        A2, B2, s2 = layer.factors()
        assert A2.shape[0] == 2 * A.shape[0] and s2 == 1 and s != s0
        torch.testing.assert_close(B2.double() @ A2.double(), expected, rtol=1e-5, atol=1e-6)


def test_references_survive_the_round_trip(continued, tmp_path):
    save_reference(tmp_path, continued)
    bare = [AdaptedLayer(layer.name, layer.module, layer.adapter) for layer in continued]
    for one, other in zip(load_reference(tmp_path, bare), continued, strict=True):
        assert one.name == other.name and one.reference.scaling == other.reference.scaling
        assert all(torch.equal(a, b) for a, b in zip(one.reference[:2], other.reference[:2], strict=True))


def test_an_adapter_that_started_at_zero_has_no_file(tmp_path):
    layers = adapted_layers(adapted(0.3))
    save_reference(tmp_path, layers)
    assert not list(tmp_path.iterdir()) and load_reference(tmp_path, layers) == layers


def test_file_of_other_layers_is_refused(continued, tmp_path):
    save_reference(tmp_path, continued[1:])
    path = tmp_path / "agl" / REFERENCE_FILE
    with pytest.raises(ArtifactError) as failed:
        load_reference(tmp_path, continued)
    reason = f"layer '{continued[0].name}' is not covered"
    assert str(failed.value) == f"The reference factors in '{path}' can't be used, incomplete or malformed: {reason}."
    tensors, metadata = load_tensors(path)
    name = f"{continued[1].name}.B"
    save_tensors(path, tensors | {name: tensors[name][1:]}, metadata)
    with pytest.raises(ArtifactError, match=r"q_proj|k_proj.*floats of"):
        load_reference(tmp_path, continued[1:])
    save_tensors(path, tensors, metadata | {"kind": "fisher"})
    with pytest.raises(ArtifactError, match="holds no reference factors"):
        load_reference(tmp_path, continued[1:])
