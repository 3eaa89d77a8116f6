"""Distil the embedded teacher from Python: python examples/distill.py [output_dir] [max_steps]."""

import sys

from tutelage import (
    DEFAULT_EVAL_TEXT,
    DEFAULT_TEACHER,
    DEFAULT_TEXT,
    CurriculumConfig,
    CurriculumTrainer,
    get_task,
    load_tokenizer,
    make_student,
    read_dataset,
    student_config,
    tokenize,
)

output_dir = sys.argv[1] if len(sys.argv) > 1 else "example-output"
max_steps = int(sys.argv[2]) if len(sys.argv) > 2 else 150

task = get_task("causal_lm")
tokenizer = load_tokenizer(DEFAULT_TEACHER)
teacher = task.load(DEFAULT_TEACHER)
student = make_student("layers=2,hidden_size=64", task, student_config("layers=2,hidden_size=64", teacher.config))
train, held_out = (
    tokenize(read_dataset(text), tokenizer, task, max_length=128) for text in (DEFAULT_TEXT, DEFAULT_EVAL_TEXT)
)

trainer = CurriculumTrainer(
    model=student,
    teacher_model=teacher,
    args=CurriculumConfig(output_dir=output_dir, max_steps=max_steps, learning_rate=1e-2, eval_with_teacher=True),
    train_dataset=train,
    eval_dataset=held_out.select(range(64)),
    processing_class=tokenizer,
)
trainer.train()
print(trainer.evaluate())
trainer.save_model()
