"""Training: the stage objective, `CurriculumConfig`, `CurriculumTrainer`, cost accounting, resume and the output folder.

Where targets come from is in `tutelage.targets`; loading by name and reports are in `tutelage.runs`."""
