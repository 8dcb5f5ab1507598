"""Rows to protect and prompts to ask, from any of TRL's formats."""
