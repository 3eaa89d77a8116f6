"""Bad values of options, for `reliability_options.py`: what each command is told, and how it must end."""

import itertools
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

# options of a command that is sound; {w} is the folder of `reliability_options_world`, {out} an output folder of its own
_RUN = (
    "--dataset={w}/text.txt --output_dir={out} --max_steps=2 --max_length=16 --per_device_train_batch_size=4 "
    "--calibration_samples=8 --max_samples=6 --use_cpu=true"
)
SOUND = {
    "distill": f"--teacher={{w}}/causal_lm --student=layers=2,hidden_size=16 --save_strategy=no {_RUN}",
    "extract": f"--teacher={{w}}/causal_lm --student=layers=2,hidden_size=16 {_RUN}",
    "plan": "--teacher={w}/causal_lm --student=layers=2,hidden_size=16",
    "evaluate": "--model={w}/causal_lm --dataset={w}/text.txt --max_length=16 --max_samples=4",
    "inspect": "",
    "report": "",
    "diagnose": "--teacher={w}/causal_lm --dataset={w}/text.txt --output_dir={out} --max_length=16 --max_samples=4 "
    "--length=2",
    "compare": "parity-mlp/smoke --methods scratch --teacher planted --seeds 0 --tuning_seeds= --teacher_width=100 "
    "--budget_samples=3200 --stage_samples=640 --eval_samples=64 --output_dir={out}",
}
RECIPE = {"compare": SOUND["compare"], "diagnose": "parity-mlp/smoke --teacher planted --output_dir={out}"}


@dataclass(frozen=True)
class Case:
    """A command line, and whether it must be refused (exit code 2 and one line), run, or either of the two, where that depends
    on the versions of libraries."""

    command: str
    words: str  # options, as in a shell
    ends: str = "refused"  # `refused`, `runs` or `either`
    sound: str | None = None  # the options before them; None: those of `SOUND`

    @property
    def name(self) -> str:
        return f"{self.command} {self.words}"

    def arguments(self, world: str, out: str) -> list[str]:
        sound = SOUND[self.command] if self.sound is None else self.sound
        words = [*sound.split(), *shlex.split(self.words)]
        return [self.command, *(word.replace("{w}", world).replace("{out}", out) for word in words)]


COUNT = "0 -1 1.5 nan inf x 99999999999999999999"
AMOUNT = "-1 nan inf x"
POSITIVE = "0 -1 nan inf x"
FRACTION = "-0.1 1.1 nan inf x"
SEED = "-1 4294967296 1.5 nan"
_COUNTS = (
    "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps calibration_samples "
    "logits_chunk_size top_k num_stages max_length max_samples eval_accumulation_steps ddp_timeout torch_empty_cache_steps"
)
# command -> values -> options that cannot have any of them
NUMBERS = {
    "distill": {
        COUNT: _COUNTS,
        AMOUNT: "learning_rate stage_learning_rate warmup_steps weight_decay max_grad_norm hidden_weight adam_epsilon "
        "eval_delay neftune_noise_alpha",
        POSITIVE: "temperature num_train_epochs logging_steps eval_steps save_steps",
        FRACTION: "adam_beta1 adam_beta2 label_weight stage_fraction eval_fraction mlm_probability",
        SEED: "seed data_seed projection_seed",
        "0 -2 1.5 nan x": "max_steps stage_steps",
        "-1 1.5 x": "save_total_limit dataloader_num_workers",
    },
    "extract": {
        COUNT: "shard_tokens devices projection_dim top_k max_length calibration_samples",
        FRACTION: "eval_fraction",
    },
    "plan": {
        COUNT: "max_length runs projection_dim top_k num_stages",
        POSITIVE: "tokens tokens_per_second temperature",
        SEED: "projection_seed",
    },
    "evaluate": {COUNT: "batch_size max_length max_samples", FRACTION: "mlm_probability"},
    "diagnose": {COUNT: "length max_samples max_length"},
}
RECIPE_NUMBERS = {
    "compare": {
        "0 -1 1.5 nan inf x 1e30": "batch_size budget_samples eval_every eval_samples d k teacher_width student_width "
        "stage_samples",
        POSITIVE: "learning_rates teacher_learning_rate target",
        "-1 1e30 1.5 nan x": "seeds teacher_seeds",
        "0 -1 1.5 nan x": "trials fine_eval_every",
        "0 -1 nan x": "teacher_factor jobs",
    },
    "diagnose": {
        "0 -1 nan x 1e30": "d k teacher_width student_width",
        POSITIVE: "learning_rates target",
        "-1 1e30 nan x": "seeds",
    },
}
EMPTY = {
    "distill": "student dataset eval_dataset dataset_split text_column output_dir teacher method task teacher_dtype "
    "attn_implementation curriculum_dir layer_map projection normalize warm_start student_init residual_basis start_blocks "
    "blocks preset lr_scheduler_type resume_from_checkpoint",
    "extract": "student dataset output_dir teacher dtype stages",
    "plan": "student teacher tokens layer_map",
    "evaluate": "model dataset teacher pairs retrieval task text_column dataset_split blocks config",
    "compare": "teacher output_dir methods variant match config",
    "diagnose": "teacher dataset eval_dataset output_dir blocks text_column",
}
REFUSED = """
distill --student=layers=2,layers=3
distill --student=layers=2,num_hidden_layers=3
distill --student=layers=0
distill --student=layers=two
distill --student=layers=
distill --student=layers=2,
distill --student=layers=10000000
distill --student=hidden_size=999999999
distill --student=intermediate_size=99999999999999
distill --student=heads=3
distill --student=depth=3
distill --student=hidden_size=[
distill --student=hidden_size=2001-99-99
distill --student=layers=2,vocab_size=-1
distill --student={w}/file
distill --student={w}/deep.json
distill --student={w}/text.txt
distill --student=/nowhere/student
distill --student={w}/empty
distill --teacher={w}/deep
distill --teacher={w}/text.txt
distill --teacher=nobody/nothing
distill --config={w}/merge.yaml
distill --config={w}/twice.yaml
distill --config={w}/nested.yaml
distill --config={w}/keys.yaml
distill --config={w}/list.yaml
distill --config={w}/date.yaml
distill --config={w}/nowhere.yaml
distill --config={w}/empty
distill --dataset={w}/file
distill --dataset={w}/empty
distill --dataset={w}/short.txt
distill --eval_dataset={w}/short.txt
distill --dataset={w}/few.txt
distill --dataset=s3://bucket/text.txt
distill --dataset=nonsense://bucket/text.txt
distill --streaming=true --dataset=s3://bucket/*.jsonl
distill --streaming=maybe
distill --streaming=true --max_steps=-1
distill --output_dir=s3://bucket/run
distill --output_dir={w}/file
distill --output_dir={w}/causal_lm
distill --output_dir=/proc/nowhere/run
distill --metric_for_best_model=bleu --load_best_model_at_end=true --eval_strategy=epoch --save_strategy=epoch
distill --report_to=wandb
distill --report_to=nonsense
distill --optim=nonsense
distill --optim_args=x
distill --adam_beta1=1
distill --lr_scheduler_type=nonsense
distill --lr_scheduler_kwargs=x
distill --gradient_checkpointing=true --gradient_checkpointing_kwargs=x
distill --accelerator_config=x
distill --deepspeed=x
distill --debug=x
distill --log_level=x
distill --liger_kernel_config=x
distill --use_liger_kernel=true
distill --torch_compile_backend=x
distill --torch_compile_mode=x
distill --dataloader_prefetch_factor=0 --dataloader_num_workers=1
distill --dataloader_persistent_workers=true
distill --dataloader_multiprocessing_context=spawn
distill --bf16=true --fp16=true
distill --attn_implementation=x
distill --teacher_quantization=x
distill --teacher_quantization={}
distill --teacher_dtype=int9
distill --teacher_device_map=nonsense
distill --student_dtype=float16
distill --embedding_loss=dot
distill --method=osmosis
distill --method=progressive
distill --method=progressive --teacher_checkpoints=/nowhere
distill --preset=mine
distill --task=translation
distill --layer_map=1:9
distill --layer_map=1-2
distill --layer_map=2:2,1:4
distill --layer_map=1:2 --num_stages=1
distill --start_blocks=9,9
distill --projection=hash
distill --normalize=layer
distill --warm_start=all
distill --student_init=mine
distill --residual_basis=mine
distill --stage_trains=mine
distill --blocks=z
distill --dataset_split=nowhere
distill --text_column=body
distill --label_smoothing_factor=0.1
distill --resume_from_checkpoint=nowhere
distill --curriculum_dir={w}/empty
distill --max_length=65
distill --temperature=1e30
distill --learning_rate=1e30
distill --num_train_epochs=1e30 --max_steps=-1
distill --hub_model_id=a/b/c --push_to_hub=true
distill --shape=round
distill --max_step=2
distill extra
extract --output_dir=s3://bucket/C
extract --output_dir=gs://bucket/C
extract --output_dir=nonsense://bucket/C
extract --output_dir={w}/file
extract --output_dir={w}/file/C
extract --dataset=s3://bucket/text.txt
extract --projection_dim=999999999
extract --dtype=int9
extract --stages 1 2
extract --method=scratch
extract --label_weight=0.5
extract --curriculum_dir={w}/empty
extract --train_sampling_strategy=group_by_length
extract --max_steps=99999999999999999999
extract --num_train_epochs=1e30 --max_steps=-1
plan --curriculum_dir={w}/empty
plan --num_train_epochs=1
plan --task=classification
plan --projection_dim=999999999 --tokens=1T
plan --tokens=many
plan --tokens=1e999
plan --student=layers=10000000
plan --student={w}/deep.json
plan --teacher={w}/deep
plan --json=maybe
plan --max_length=65
evaluate --blocks=z
evaluate --teacher={w}/causal_lm --blocks=z
evaluate --teacher={w}/embedding
evaluate --pairs={w}/pairs.jsonl
evaluate --retrieval={w}/retrieval.jsonl
evaluate --model={w}/embedding
evaluate --model={w}/deep
evaluate --model={w}/text.txt
evaluate --dataset={w}/short.txt
evaluate --dataset_split=nowhere
evaluate --text_column=body
evaluate --task=translation
evaluate --measure_speed=maybe
evaluate --config={w}/run.yaml
evaluate --max_length=65
evaluate extra
inspect {w}/empty
inspect {w}/file
inspect ''
inspect {w}/empty extra
inspect nonsense://bucket
inspect s3://bucket/C
inspect {w}/empty --quick=maybe
report {w}/empty
report {w}/file
report ''
report {w}/empty extra
report --quick
diagnose --length=8
diagnose --max_length=65
diagnose --max_length=1
diagnose --teacher={w}/embedding
diagnose --teacher={w}/deep
diagnose --blocks=z
diagnose --dataset={w}/short.txt
diagnose --output_dir={w}/file
diagnose --shape=round
diagnose parity-mlp
diagnose pcfg-mlm/smoke
"""
REFUSED_RECIPES = """
compare --match=x
compare --methods x
compare --methods scratch scratch
compare --variant x
compare --variant x:budget=nan
compare --variant x:temperature=nan
compare --variant x:top_k=0
compare --variant x:shape=round
compare --variant ../x:temperature=2
compare --output_dir {w}/file
compare --seeds 0 0
compare --tuning_seeds 0
compare --k 99
compare --student x
compare --config {w}/run.yaml
compare --shape round
diagnose --dataset={w}/text.txt
diagnose --shape=round
"""
REFUSED_WHOLE = """
compare nothing
compare parity-mlp/x
compare --config={w}/run.yaml
compare --config={w}/nowhere.yaml
compare --config={w}/merge.yaml
compare --teacher={w}/causal_lm
compare --student=layers=2,layers=3
compare --max_length=0
compare --mlm_probability=nan
compare --learning_rate=1
compare scaling/x
compare scaling/smoke --ks=
compare scaling/smoke --ks=0
compare scaling/smoke --ds=8
compare scaling/smoke --seeds=
compare scaling/smoke --target=nan
compare scaling/smoke --methods scratch
compare pcfg-mlm/smoke --layers=100000000
compare pcfg-mlm/smoke --levels=99
compare pcfg-mlm/smoke --stage_fraction=nan
compare pcfg-mlm/smoke --num_stages=0
compare text-clm/smoke --max_length=1
compare text-clm/smoke --dataset=/nowhere.txt
diagnose nothing
diagnose parity-mlp/x
"""
# what looks like a mistake but is sound
RUN = """
distill --save_total_limit=0
distill --top_k=1000
distill --calibration_samples=2147483647
distill --logits_chunk_size=2147483647
distill --max_samples=2147483647
distill --per_device_eval_batch_size=2147483647
distill --gradient_accumulation_steps=1000
distill --per_device_train_batch_size=1000
distill --learning_rate=0
distill --warmup_steps=1000
distill --hidden_weight=0
distill --label_weight=1
distill --student=layers=4
distill --student=vocab_size=78
distill --save_steps=1e30 --save_strategy=steps
distill --text_column=text
extract --top_k=1000
extract --shard_tokens=1
extract --devices=2147483647
extract --max_steps=2147483647
plan --student=layers=4
plan --max_length=64
plan --tokens=1e30
evaluate --max_samples=2147483647
evaluate --batch_size=2147483647
evaluate --mlm_probability=0.5
diagnose --max_samples=2147483647
compare --seeds 2147483647
"""
# depends on the version of transformers
EITHER = """
distill --student=hidden_size=7
plan --student=hidden_size=7
"""


def cases() -> list[Case]:
    """Every case once."""
    return list(dict.fromkeys(itertools.chain(_written(), _numbers())))


def _written() -> Iterator[Case]:
    for text, ends, sound in (
        (REFUSED, "refused", None),
        (REFUSED_WHOLE, "refused", ""),
        (RUN, "runs", None),
        (EITHER, "either", None),
    ):
        for line in text.strip().splitlines():
            command, _, words = line.partition(" ")
            yield Case(command, words, ends, sound)
    for line in REFUSED_RECIPES.strip().splitlines():
        command, _, words = line.partition(" ")
        yield Case(command, words, sound=RECIPE[command])
    for command, names in EMPTY.items():
        sound = "" if command == "compare" else None
        for name in names.split():
            yield Case(command, f"--{name}=", sound=sound)


def _numbers() -> Iterator[Case]:
    for table, sounds in ((NUMBERS, {}), (RECIPE_NUMBERS, RECIPE)):
        for command, kinds in table.items():
            for values, names in kinds.items():
                for name, value in itertools.product(names.split(), values.split()):
                    yield Case(command, f"--{name}={value}", sound=sounds.get(command))
