"""AGL as a plugin of Axolotl: `plugins: [agl_trl.integrations.axolotl.AlignGuardPlugin]`, and a section `agl:`."""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator
from transformers import TrainerCallback

from .settings import check_settings, make_callback


class AlignGuardArgs(BaseModel):
    """
    What the plugin adds to Axolotl's config.

    Args:
        agl (`dict`, *optional*):
            Options of [`AlignGuardConfig`], and where rows come from, as in [`check_settings`]. Without it AGL keeps the model's own
            answers to DriftCaps' requests.
    """

    agl: dict[str, Any] | None = None

    @field_validator("agl")
    @classmethod
    def _checked(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        check_settings(value or {})
        return value


class AlignGuardPlugin(BasePlugin):
    """
    Puts [`AlignGuardCallback`] in the trainer that Axolotl builds. The model must be trained with `adapter: lora` or `qlora`.

    Example:

    ```yaml
    plugins:
      - agl_trl.integrations.axolotl.AlignGuardPlugin
    agl:
      kl_budget: 0.02
      alignment_dataset: refusals.jsonl
    ```
    """

    def get_input_args(self) -> str:
        return f"{__name__}.{AlignGuardArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[TrainerCallback]:
        return [make_callback(dict(cfg.agl or {}))]
