"""Files: written whole or not at all, on this machine or behind any fsspec URL.

Nothing here knows of models or runs.
"""
