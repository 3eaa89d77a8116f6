"""Tasks: one class each says how its models are loaded, fed, compared, measured and saved; also data and student presets.

Nothing here trains.
"""
