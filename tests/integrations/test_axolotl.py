"""The plugin with Axolotl's own classes; skipped where Axolotl is not installed."""

import pytest


base = pytest.importorskip("axolotl.integrations.base", reason="Axolotl is not installed")

PLUGIN = "agl_trl.integrations.axolotl.AlignGuardPlugin"


@pytest.fixture
def manager():
    manager = base.PluginManager.get_instance()
    manager.plugins.clear()
    manager.register(PLUGIN)
    yield manager
    manager.plugins.clear()


def test_section_is_part_of_the_config_and_checked(manager):
    from axolotl.integrations.config import merge_input_args

    _, config_class = merge_input_args()
    assert "agl" in config_class.model_fields
    arguments = manager.get_input_args()
    assert arguments == ["agl_trl.integrations.axolotl.AlignGuardArgs"]

    from agl_trl.integrations.axolotl import AlignGuardArgs

    assert AlignGuardArgs(agl={"kl_budget": 0.05}).agl == {"kl_budget": 0.05}
    with pytest.raises(ValueError, match="`agl` has no key 'kl_budgt'"):
        AlignGuardArgs(agl={"kl_budgt": 0.05})


def test_callback_is_put_in_the_trainer(manager):
    from axolotl.utils.dict import DictDefault

    from agl_trl import AlignGuardCallback

    cfg = DictDefault({"agl": {"kl_budget": 0.05, "alignment_dataset": "miniworld"}})
    (guard,) = manager.add_callbacks_pre_trainer(cfg, None)
    assert isinstance(guard, AlignGuardCallback) and guard.config.kl_budget == 0.05
    assert guard.alignment_dataset is not None and "unsafe" in guard.alignment_dataset.column_names
