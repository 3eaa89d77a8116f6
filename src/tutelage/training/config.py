"""The settings of a run: `transformers.TrainingArguments` and what a curriculum adds."""

import json
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import is_liger_kernel_available

from tutelage.core.curriculum import (
    METHODS,
    NORMALIZE,
    OUTPUT_LOSSES,
    OUTPUT_POSITIONS,
    RESIDUAL,
    STAGE_TRAINS,
    STUDENT_INITS,
)
from tutelage.core.errors import LARGEST, UserError, as_user_error, check_positive, check_range, check_texts
from tutelage.core.residual import BASES

_DEFAULT: dict[str, Any] = {
    "method": "extraction",
    "learning_rate": 2e-3,
    "warmup_steps": 0.1,
    "per_device_train_batch_size": 16,
    "num_train_epochs": 3.0,
    "stage_fraction": 0.5,
    "stage_trains": "up_to",
    "projection": "gaussian",
    "projection_seed": 0,
    "student_init": "teacher",
    "normalize": "standardize",
    "calibration_samples": 64,
    "output_loss": "kl",
    "output_positions": "labelled",
    "temperature": 1.0,
    "hidden_weight": 3.0,
}
# Values of the options that are not given: ours, and those of arXiv:2503.17494, with a stage for each block of the student.
PRESETS: dict[str, dict[str, Any]] = {
    "default": _DEFAULT,
    "paper": {
        **_DEFAULT,
        "method": "extraction",
        "warmup_steps": 0.06,
        "stage_fraction": 0.5,
        "stage_trains": "up_to",
        "projection": "gaussian",
        "normalize": "none",
        "warm_start": "none",
        "student_init": "random",
        "output_loss": "kl",
        "output_positions": "labelled",
        "temperature": 1.0,
    },
}
# What the default preset has for a student that starts from its teacher: hidden states and output together did best there.
AFTER_START: dict[str, Any] = {"method": "joint", "projection": RESIDUAL}

# settings with a few values, of which None leaves the choice open
_CHOICES = {
    "method": METHODS,
    "student_init": STUDENT_INITS,
    "stage_trains": STAGE_TRAINS,
    "residual_basis": BASES,
    "normalize": NORMALIZE,
    "output_loss": OUTPUT_LOSSES,
    "output_positions": OUTPUT_POSITIONS,
}
# names of settings, and the smallest and largest value that they may have
_RANGES: tuple[tuple[tuple[str, ...], int, float], ...] = (
    (("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1, LARGEST),
    (("calibration_samples", "logits_chunk_size", "top_k", "num_stages"), 1, LARGEST),
    (("eval_accumulation_steps", "torch_empty_cache_steps", "ddp_bucket_cap_mb", "ddp_timeout"), 1, LARGEST),
    (("save_total_limit",), 0, LARGEST),
    (("learning_rate", "stage_learning_rate", "warmup_steps", "weight_decay", "max_grad_norm"), 0, math.inf),
    (("hidden_weight", "eval_delay", "neftune_noise_alpha", "adam_epsilon"), 0, math.inf),
    (("adam_beta1", "adam_beta2", "label_weight", "stage_fraction"), 0, 1),
    (("dataloader_num_workers",), 0, 1024),
    (("dataloader_prefetch_factor",), 1, LARGEST),
    (("seed", "data_seed", "projection_seed"), 0, 2**32 - 1),
)
_POSITIVE = ("temperature", "num_train_epochs", "logging_steps", "eval_steps", "save_steps", "stage_fraction")
# settings that `transformers` reads as JSON if they begin with a brace, and keeps as text otherwise
_MAPPINGS = ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")


def option(help: str, default: Any = None, *aliases: str) -> Any:
    """A dataclass field that is an option of the command line."""
    return field(default=default, metadata={"help": help, "aliases": list(aliases)})


@dataclass
class CurriculumConfig(TrainingArguments):
    """Arguments of `CurriculumTrainer`; every `TrainingArguments` field keeps its meaning.

    `max_steps` (or `num_train_epochs`) is the budget of the *whole* curriculum. Warm-up and decay are counted within each
    stage: `warmup_steps` below 1 is a fraction of the stage's steps.

    None means *not given*: the extracted curriculum decides where there is one, otherwise the preset."""

    # Other defaults than transformers', for small students.
    output_dir: str | None = option("Folder the run is written to.", "tutelage-output")
    learning_rate: float | None = option(  # type: ignore[assignment]
        "Peak learning rate of every stage; default: 2e-3 (embedded teacher: 1e-2)."
    )
    lr_scheduler_type: str = option("Decay within each stage.", "cosine")
    warmup_steps: float | None = option("Warm-up of each stage: steps, or a fraction below 1; default: 0.1.")  # type: ignore[assignment]
    per_device_train_batch_size: int | None = option("Examples per device and micro-step; default: 16.")  # type: ignore[assignment]
    num_train_epochs: float | None = option("Passes over the training data, where max_steps is not given; default: 3.")  # type: ignore[assignment]
    max_steps: int = option("Optimiser steps of the whole curriculum; replaces num_train_epochs.", -1)
    per_device_eval_batch_size: int = option("Examples per device in evaluation.", 16)
    logging_steps: float = option("Optimiser steps between logs.", 10)
    save_total_limit: int | None = option("Checkpoints kept; 0 keeps all.", 2)
    resume_from_checkpoint: str | None = option(
        "auto: start the run, or continue the one in output_dir; true: from its newest checkpoint; or a checkpoint's folder.",
        None,
        "--resume",
    )

    preset: str = option("Settings that are not given: default, or paper (arXiv:2503.17494).", "default")
    method: str | None = option(
        f"One of {', '.join(METHODS)}; default: joint for a student that starts from its teacher, otherwise extraction."
    )
    task: str | None = option("causal_lm, masked_lm, sequence_classification or embedding; default: the teacher's.")
    teacher_model_name_or_path: str | None = option(
        "Teacher: folder or Hub name; default: the embedded one.", None, "--teacher"
    )
    disable_dropout: bool = option(
        "Train the student without dropout: noise that the teacher's targets do not have.", True
    )
    student_dtype: str = option("float32, or stored: the precision that the student's weights come in.", "float32")
    teacher_checkpoints: list[str] | None = option("Progressive: folders of teacher checkpoints, early to late.")
    teacher_dtype: str | None = option("Parameter dtype of the teacher, e.g. bfloat16; default: the checkpoint's.")
    attn_implementation: str | None = option(
        "Attention of student and teacher, as in transformers; default: eager for short rows in bf16 on the CPU, else what "
        "each has."
    )
    teacher_device_map: str | None = option("transformers' device_map of the teacher, e.g. auto for several devices.")
    teacher_quantization: str | None = option(
        "transformers' quantization_config of the teacher as JSON, e.g. "
        '\'{"quant_method": "bitsandbytes", "load_in_4bit": true}\'.'
    )
    trust_remote_code: bool = option("Run model code that comes with a checkpoint.", False)
    curriculum_dir: str | None = option("Train from this extracted curriculum, not from a teacher.")
    check_curriculum: bool = option(
        "Verify the checksums of a local curriculum_dir, or of the shards that an extraction finds; false skips this.",
        True,
    )
    layer_map: str | None = option(
        "Hidden stages as student:teacher, e.g. '1:2,2:4' or 'final:final' (in Python also as pairs); default: "
        "final:final where warm_start transplants the head, else the blocks that the student starts from, or uniform."
    )
    num_stages: int | None = option("Hidden stages (joint: pairs of places) of the uniform layer map.")
    stage_fraction: float | None = option("Fraction of the steps that the hidden stages get together; default: 0.5.")
    stage_steps: list[int] | None = option(
        "Steps of every hidden stage (one number) or of each; replaces stage_fraction."
    )
    stage_learning_rate: float | None = option("Peak learning rate of hidden stages; default: learning_rate.")
    stage_trains: str | None = option(
        "Hidden stages train everything up_to their block (default), or only what is new since the stage before."
    )
    projection: str | None = option(
        "gaussian (the paper), orthogonal, rademacher, pca, logits, residual (the basis of student_init=teacher), or learned "
        "(a linear map from the student to the teacher, trained with it and thrown away); default: residual after "
        "student_init=teacher, otherwise gaussian."
    )
    projection_seed: int | None = option("Seed of the random projections; default: 0.")
    normalize: str | None = option("standardize (default), or none (the paper).")
    warm_start: str | None = option(
        "none (the paper), head, embedding or head+embedding: start from the teacher's weights. Default of extraction: none "
        "for a student with trained weights (the teacher's, or its own) and for classifiers; otherwise head where layer_map "
        "ends with final:final or neither layer_map nor num_stages is given, else none. Default of other methods: none."
    )
    student_init: str | None = option(
        "First weights of the student: random (the paper), or teacher; default: teacher for a student without weights, where "
        "its family is known."
    )
    residual_basis: str | None = option(
        "Basis of student_init=teacher: pca, logits, random, or identity; default: identity for equal widths, else pca."
    )
    start_blocks: str | None = option(
        "Blocks of the teacher that those of the student start from: uniform, ends (its first and last ones), or numbers, e.g. "
        "'1,2,11,12'; default: those of a given layer_map, else ends for decoders, uniform for encoders."
    )
    calibration_samples: int | None = option("Training examples that the calibration pass reads; default: 64.")
    output_loss: str | None = option(
        "kl (default), or mse: mean squares of logits in place of the divergence; not for sentence encoders."
    )
    output_positions: str | None = option(
        "Masked language models: compare outputs at labelled positions (default), or at all that are no padding."
    )
    temperature: float | None = option("Softmax temperature of the output loss; default: 1.")
    top_k: int | None = option("Keep the k most likely teacher outputs, merge the rest into one bucket; default: all.")
    hidden_weight: float | None = option(
        "Joint: weight of the mean of the hidden losses, where the output loss has weight 1; default: 3."
    )
    label_weight: float = option("Fraction of label loss in output stages, 0 to 1.", 0.0)
    embedding_loss: str = option("Encoders: cosine or mse on the pooled embedding.", "cosine")
    logits_chunk_size: int | None = option(
        "Positions whose logits are held at a time; default: from the vocabulary size."
    )
    blocks: str | None = option("Dotted name of the list of blocks, for models where several are found.")
    eval_with_teacher: bool = option("Also compare with the teacher in evaluations during training.", False)
    overwrite_output_dir: bool = option("Replace the run in output_dir.", False)

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UserError(f"unknown preset {self.preset!r}: use one of {', '.join(PRESETS)}")
        self._check_values()
        if self.fsdp == "true":  # as YAML files and flags of this program say it
            self.fsdp = True  # type: ignore[assignment]
        open_choices = [name for name in ("learning_rate", "warmup_steps") if getattr(self, name) is None]
        for name in open_choices:  # transformers compares them with numbers
            setattr(self, name, self.value(name))
        with as_user_error("transformers refuses the arguments", ValueError, TypeError, ImportError, OSError):
            super().__post_init__()
        for name in open_choices:
            setattr(self, name, None)
        self._check_libraries()
        self.check_choices()
        if self.embedding_loss not in ("cosine", "mse"):
            raise UserError(f"unknown embedding_loss {self.embedding_loss!r}: use 'cosine' or 'mse'")
        if self.student_dtype not in ("float32", "stored"):
            raise UserError(f"unknown student_dtype {self.student_dtype!r}: use 'float32' or 'stored'")
        if self.teacher_dtype is not None and not isinstance(getattr(torch, self.teacher_dtype, None), torch.dtype):
            raise UserError(f"unknown teacher_dtype {self.teacher_dtype!r}: use a torch dtype such as bfloat16")
        if self.label_smoothing_factor:
            raise UserError("label_smoothing_factor has no part in the losses here: use temperature or label_weight")
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # pinning needs an accelerator, and warns without one
        self.logging_nan_inf_filter = False  # the trainer stops at a loss that is not finite; the filter would hide it

    def _check_values(self) -> None:
        """Raise UserError for numbers and texts that no run can have."""
        check_texts(self)
        for names, least, most in _RANGES:
            for name in names:
                check_range(name, getattr(self, name, None), least, most)
        for name in _POSITIVE:
            check_positive(name, getattr(self, name))
        given: Any = self.stage_steps
        if isinstance(given, int):
            self.stage_steps = [given]
        for steps in self.stage_steps or ():
            check_range("stage_steps", steps, 1, LARGEST)
        if self.max_steps != -1 and not 1 <= self.max_steps <= LARGEST:
            found = f"max_steps must be at least 1, or -1 for num_train_epochs, got {self.max_steps}"
            raise UserError(
                found if self.max_steps < 1 else f"max_steps must be at most {LARGEST}, got {self.max_steps}"
            )

    def _check_libraries(self) -> None:
        """Raise UserError for what a library would refuse in the middle of a run, or silently leave out."""
        installed = get_available_reporting_integrations()
        for name in self.report_to or []:
            if name in INTEGRATION_TO_CALLBACK and name not in installed:
                raise UserError(f"report_to names {name!r}, which is not installed: install it, or leave it out")
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise UserError("use_liger_kernel needs liger-kernel, which is not installed: install it, or leave it out")
        backend, mode = str(self.torch_compile_backend), self.torch_compile_mode
        if self.torch_compile and (backend, mode) != ("inductor", None):
            what = f"torch_compile cannot have the backend {backend!r} and the mode {mode!r}"
            with as_user_error(what), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the compiler's own imports
                torch.compile(torch.nn.Identity(), backend=backend, mode=mode)  # which compiles nothing yet
        if self.save_only_model and str(self.resume_from_checkpoint).lower() == "auto":
            found = "with save_only_model a checkpoint has nothing that a run continues from"
            raise UserError(f"{found}: leave it out, or leave out resume_from_checkpoint=auto")
        if self.metric_for_best_model is not None and self.eval_strategy == "no":
            raise UserError("metric_for_best_model needs evaluations: give eval_strategy too, or leave it out")
        for name in _MAPPINGS:
            if isinstance(given := getattr(self, name, None), str):
                raise UserError(f"{name} must be a mapping as JSON, e.g. '{{\"key\": 1}}', got {given!r}")
        for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
            if getattr(self, name, None) and not self.dataloader_num_workers:
                raise UserError(f"{name} is for worker processes: give dataloader_num_workers too, or leave {name} out")

    def check_choices(self) -> None:
        """Raise UserError for a method, start, basis or `stage_trains` that there is not."""
        for name, choices in _CHOICES.items():
            if (given := getattr(self, name)) is not None and given not in choices:
                raise UserError(f"unknown {name} {given!r}: use one of {', '.join(choices)}")

    @property
    def order_seed(self) -> int:
        """Seed of the order in which data is read."""
        return self.data_seed if self.data_seed is not None else self.seed

    def value(self, name: str) -> Any:
        """A setting as given, or that of the preset."""
        given = getattr(self, name)
        return PRESETS[self.preset].get(name) if given is None else given

    def step_examples(self, devices: int) -> int:
        """Examples per optimiser step, over all micro-batches of `devices` devices."""
        return int(self.value("per_device_train_batch_size")) * self.gradient_accumulation_steps * devices

    def teacher_loading(self) -> dict[str, Any]:
        """What `load_model` is told about the teacher; UserError where `teacher_quantization` cannot be read."""
        loading: dict[str, Any] = {"dtype": self.teacher_dtype, "trust_remote_code": self.trust_remote_code}
        if self.teacher_device_map is not None:
            loading["device_map"] = self.teacher_device_map
        if self.teacher_quantization is not None:
            try:
                loading["quantization_config"] = AutoQuantizationConfig.from_dict(json.loads(self.teacher_quantization))
            except (json.JSONDecodeError, ValueError, TypeError, AttributeError, ImportError) as error:
                found = self.teacher_quantization
                raise UserError(f"teacher_quantization {found!r} cannot be used: {error}") from error
        return loading
