"""The reproduction of the paper: recipes, comparisons, scaling, diagnosis and reports.

Optional: nothing below imports it, and distill, extract, plan and evaluate work without it."""
