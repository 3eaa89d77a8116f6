"""Blocks, projections, standardisation, stages and losses: torch alone, no Hugging Face."""
