"""The method itself: blocks, projections, standardiser, stages and losses.

Of third parties only torch and numpy are imported here.
"""
