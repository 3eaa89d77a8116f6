"""Tasks: one class per task defines how models are loaded, run, compared, measured and saved. Also data and student presets.
This folder has no training code."""
