"""Runs, plans, evaluation and plots."""
