"""DriftCaps as a task of lm-evaluation-harness: `lm_eval --tasks driftcaps --include_path FOLDER`, with this folder."""
