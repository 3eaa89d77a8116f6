"""Distil the embedded teacher from Python: python examples/distill.py [output_dir] [max_steps]."""

import sys

from datasets import load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tutelage import CurriculumConfig, CurriculumTrainer
from tutelage.tasks.registry import get_task
from tutelage.tasks.embedded import DEFAULT_EVAL_TEXT, DEFAULT_TEACHER, DEFAULT_TEXT
from tutelage.tasks.students import student_config
from tutelage.tasks.registry import get_task
from tutelage.tasks.text import tokenize

output_dir = sys.argv[1] if len(sys.argv) > 1 else "example-output"
max_steps = int(sys.argv[2]) if len(sys.argv) > 2 else 150

task = get_task("causal_lm")
tokenizer = AutoTokenizer.from_pretrained(DEFAULT_TEACHER)
teacher = AutoModelForCausalLM.from_pretrained(DEFAULT_TEACHER)
config = student_config("layers=2,hidden_size=64", AutoConfig.from_pretrained(DEFAULT_TEACHER))
student = AutoModelForCausalLM.from_config(config)

files = {"train": DEFAULT_TEXT, "test": DEFAULT_EVAL_TEXT}
text = load_dataset("text", data_files=files, keep_linebreaks=True)
blocks = {split: tokenize(text[split], tokenizer, task, max_length=128) for split in files}

trainer = CurriculumTrainer(
    model=student,
    teacher_model=teacher,
    args=CurriculumConfig(output_dir=output_dir, method="extraction", max_steps=max_steps, eval_with_teacher=True),
    train_dataset=blocks["train"],
    eval_dataset=blocks["test"].select(range(64)),
    processing_class=tokenizer,
    data_collator=make_collator(task, tokenizer),
)
trainer.train()
print(trainer.evaluate())
trainer.save_model()
