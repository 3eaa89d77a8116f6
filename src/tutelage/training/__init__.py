"""Training: the stage objective, `CurriculumConfig`, `CurriculumTrainer` and cost accounting."""
