"""Jinja templates of the model cards; installed as `agl_trl.model_cards`."""
