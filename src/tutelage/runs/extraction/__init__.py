"""Running the teacher once: schedule (which rows), shard plan, encoder (teacher to columns), job (claim, write, finish).

What an extracted curriculum is, and how it is read, is in `tutelage.targets`."""
