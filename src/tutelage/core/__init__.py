"""The method itself: blocks, projections, standardiser, stages and losses.
Of third-party packages, only torch and numpy are imported here."""
