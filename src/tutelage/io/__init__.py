"""Files: written whole or not at all, on this machine or behind any fsspec URL.
This folder has no code about models or runs."""
