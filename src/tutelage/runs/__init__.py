"""The product: distill, extract, plan and evaluate, from options to a folder.

The experiments that reproduce the paper are in `tutelage.reproduction`."""
