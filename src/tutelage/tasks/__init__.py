"""Tasks: text data, students, and the models of each task. Never imports training."""
