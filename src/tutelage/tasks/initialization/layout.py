"""A teacher and a student of one family, module by module."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tutelage.core.blocks import Blocks, find_blocks
from tutelage.core.errors import UserError
from tutelage.core.inputs import text_config
from tutelage.core.probe import has_no_values
from tutelage.core.stages import check_places, uniform_layer_map
from tutelage.tasks.initialization.families import Family, Linear, Norm, Rule, families_of

Batches = Sequence[Mapping[str, Any]]  # model inputs

_BY_DEPTH = "scale_attn_by_inverse_layer_idx"  # GPT-2: a block's attention scores are divided by its number
# fields of a configuration that decide what the weights mean
_EQUAL = (
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "activation",
    "partial_rotary_factor",
    "rope_parameters",
    "query_pre_attn_scalar",
    "use_parallel_residual",
    "num_experts_per_tok",
    "norm_topk_prob",
    "is_decoder",
    "sliding_window",
    "local_attention",
    "use_bidirectional_attention",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "scale_attn_weights",
    _BY_DEPTH,
)
# fields that say what each block does
PER_BLOCK = ("layer_types", "no_rope_layers", "mlp_layer_types")
_OPTIONAL = ("pooler.dense",)  # outside of the blocks, which a student may lack


@dataclass(frozen=True)
class HeadCounts:
    """Attention heads of a model's blocks."""

    heads: int
    groups: int  # key-value heads
    size: int

    @classmethod
    def of(cls, config: Any) -> HeadCounts:
        text = text_config(config)
        heads = text.num_attention_heads
        groups = getattr(text, "num_key_value_heads", None) or heads
        return cls(heads, groups, getattr(text, "head_dim", None) or text.hidden_size // heads)


@dataclass(frozen=True)
class Part:
    """A module of the student that has parameters, or a norm that it lacks, and its counterpart."""

    name: str  # in the student
    rule: Rule
    student: nn.Module
    teacher: nn.Module
    block: int | None  # the student's, 1-based; None outside of the blocks
    inner: str  # the name that the family's table knows it by


class Layout:
    """Pairs the modules of a student with those of its teacher.

    `pairs` gives the teacher's block for each of the student's. Raises UserError for models of different families, or one
    that is not described."""

    def __init__(self, student: nn.Module, teacher: nn.Module, pairs: Sequence[int], container: str | None = None):
        self.student, self.teacher, self.pairs = student, teacher, list(pairs)
        configs: list[Any] = [text_config(model.config) for model in (student, teacher)]
        self.student_config, self.teacher_config = configs
        self.student_blocks, self.teacher_blocks = find_blocks(student, container), find_blocks(teacher, container)
        kinds = [config.model_type for config in configs]
        if kinds[0] != kinds[1]:
            found = f"the student is a {kinds[0]!r} model, the teacher a {kinds[1]!r} model"
            raise UserError(f"{found}: student_init='teacher' needs models of one family; use student_init='random'")
        self._check_equal(_EQUAL)
        self.family = self._family(kinds[0])
        self.student_heads, self.teacher_heads = map(HeadCounts.of, configs)
        if self.student_heads.size != (size := self.teacher_heads.size):
            found = f"the student's attention heads have {self.student_heads.size} values, the teacher's {size}"
            how = f"set num_attention_heads (or head_dim) so that a head has {size}"
            if not getattr(configs[0], "head_dim", None) and configs[0].hidden_size % size:
                how = f"set hidden_size to a multiple of {size}"
            raise UserError(f"student_init='teacher': {found}: {how}")
        self._check_blocks()
        self.parts = self._parts()
        self._check_modules()
        for part in self.parts:
            self._check_parameters(part)

    def _check_equal(self, fields: Iterable[str]) -> None:
        """UserError where the models' configurations differ in one of `fields`."""
        for name in fields:
            mine, theirs = (getattr(config, name, None) for config in (self.student_config, self.teacher_config))
            if mine != theirs:
                found = f"the student has {name}={mine}, the teacher {theirs}"
                raise UserError(f"student_init='teacher': {found}: set the teacher's in the student's configuration")

    def _check_blocks(self) -> None:
        """UserError where a block of the student does something else with its weights than the teacher's block."""
        for number, theirs in enumerate(self.pairs, 1):
            for name in PER_BLOCK:
                lists = [getattr(config, name, None) for config in (self.student_config, self.teacher_config)]
                if lists[0] and lists[1] and lists[0][number - 1] != lists[1][theirs - 1]:
                    found = f"block {number} of the student has {name} {lists[0][number - 1]}, block {theirs} of the teacher"
                    how = f"change the layer map, or {name} of the student"
                    raise UserError(f"student_init='teacher': {found}, its start, {lists[1][theirs - 1]}: {how}")
            if number != theirs and getattr(self.teacher_config, _BY_DEPTH, False):
                found = f"block {number} of the student starts from block {theirs} of the teacher"
                raise UserError(
                    f"student_init='teacher': {found}, but {_BY_DEPTH} gives them different attention: use "
                    "student_init='random'"
                )

    @classmethod
    def of(
        cls,
        student: nn.Module,
        teacher: nn.Module,
        layer_map: Sequence[tuple[Any, Any]] = (),
        container: str | None = None,
    ) -> Layout:
        """With the blocks of a layer map, and in proportion between them."""
        counts = [len(find_blocks(model, container)) for model in (student, teacher)]
        return cls(student, teacher, block_pairs(counts[0], counts[1], layer_map), container)

    def _family(self, model_type: str) -> Family:
        unknown = ""
        for family in families_of(model_type):
            missing = []
            for model, blocks in ((self.student, self.student_blocks), (self.teacher, self.teacher_blocks)):
                names = [name for name, rule, *_ in self._walk(family, model, blocks) if rule is None]
                missing += [f"{name} of a {type(model).__name__}" for name in names]
            if not missing:
                return family
            unknown = unknown or missing[0]
        raise UserError(
            f"student_init='teacher' does not know what {unknown} reads and writes: use "
            f"student_init='random', or describe it: register_family({model_type!r}, Family(...)), see {Family.__module__}"
        )

    @staticmethod
    def _walk(family: Family, model: nn.Module, blocks: Blocks) -> Iterator[tuple[str, Rule | None, int | None, str]]:
        """Every module with parameters of its own, and every norm that a block may lack: name, rule, block, inner name."""
        prefixes = {f"{name}.": number for number, name in enumerate(blocks.names, 1)}
        for name, module in model.named_modules():
            prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
            owns = any(True for _ in module.parameters(recurse=False))
            if prefix is not None:
                inner = name.removeprefix(prefix)
                rule = family.block.get(inner)
                if owns or isinstance(rule, Norm):
                    yield name, rule, prefixes[prefix], inner
            elif owns:
                # the longest name that fits: `classifier.dense` before `dense`
                fitting = [key for key in family.outside if name == key or name.endswith(f".{key}")]
                inner = max(fitting, key=len, default="")
                yield name, family.outside.get(inner), None, inner

    def _parts(self) -> list[Part]:
        """Every module of the student that is written."""
        found = []
        for name, rule, block, inner in self._walk(self.family, self.student, self.student_blocks):
            assert rule is not None
            theirs = self.teacher_name(name, block)
            try:
                module = self.teacher.get_submodule(theirs)
            except AttributeError:
                lacks = f"the student has {name}, the teacher no {theirs}"
                raise UserError(f"student_init='teacher': {lacks}: {self._class_hint(inner)}") from None
            mine = self.student.get_submodule(name)
            _check_weights(mine, rule, f"{name} of the student")
            _check_weights(module, rule, f"{theirs} of the teacher")
            found.append(Part(name, rule, mine, module, block, inner))
        return found

    def _check_modules(self) -> None:
        """UserError for a module of the teacher that decides something else than the student's, or that the student lacks."""
        known = {part.name for part in self.parts}
        for name, _, block, inner in self._walk(self.family, self.teacher, self.teacher_blocks):
            mine = [name]
            if block is None:
                self._check_equal(self.family.decided_by.get(inner, ()))
            else:
                rest = name.removeprefix(self.teacher_blocks.names[block - 1])
                starts = zip(self.student_blocks.names, self.pairs, strict=True)
                mine = [start + rest for start, theirs in starts if theirs == block]
            lacking = [each for each in mine if each not in known]
            owns = any(True for _ in self.teacher.get_submodule(name).parameters(recurse=False))
            if lacking and owns and (block is not None or inner not in _OPTIONAL):
                lacks = f"the teacher has {name}, the student no {lacking[0]}"
                raise UserError(f"student_init='teacher': {lacks}: {self._class_hint(inner)}")

    def _class_hint(self, inner: str) -> str:
        """What to do where only one of the models has a module."""
        if inner != "embeddings_project":  # ELECTRA's, where embeddings have a width of their own
            return "use a student of the teacher's class"
        widths = [(config.hidden_size, config.embedding_size) for config in (self.student_config, self.teacher_config)]
        if widths[1][0] == widths[1][1]:
            return f"set embedding_size to the student's hidden_size, {widths[0][0]}"
        return f"set hidden_size to a value other than the embedding_size, {widths[1][1]}"

    def _check_parameters(self, part: Part) -> None:
        """UserError for a parameter of the teacher that the student lacks, unless it is zero or goes into other weights."""
        for name, value in part.teacher.named_parameters(recurse=False):
            if getattr(part.student, name, None) is not None:
                continue
            how = self._bias_hint()
            if isinstance(part.student, nn.Identity):  # a norm: gain and bias go into its readers
                how = "change the layer map"
                readers = [each.student for each in self.parts if each.name in self.readers(part)]
                if name == "weight" or (readers and all(bias_of(reader) is not None for reader in readers)):
                    continue
            if has_no_values(part.teacher) or bool(value.any()):
                where = self.teacher_name(part.name, part.block)
                found = f"the teacher has a {name} in {where} that is not zero, the student none"
                raise UserError(f"student_init='teacher': {found}: {how}")

    def _bias_hint(self) -> str:
        """What to do where only one of the models has a bias."""
        mine, theirs = vars(self.student_config), vars(self.teacher_config)
        names = [name for name in theirs if name.endswith("bias") and theirs[name] != mine.get(name)]
        wanted = ", ".join(f"{name}={theirs[name]}" for name in names)
        return f"set {wanted} for the student" if names else "use a student with the configuration of its teacher"

    def teacher_name(self, name: str, block: int | None) -> str:
        """The name of the teacher's counterpart of a module."""
        if block is None:
            return name
        mine = self.student_blocks.names[block - 1]
        return self.teacher_blocks.names[self.pairs[block - 1] - 1] + name.removeprefix(mine)

    def readers(self, norm: Part) -> list[str]:
        """Names of the student's maps, or parameters, that read a norm's output; empty where one has other uses too."""
        assert isinstance(norm.rule, Norm)
        if norm.block is not None:
            prefix = self.student_blocks.names[norm.block - 1]
            return [f"{prefix}.{name}" for name in norm.rule.readers]
        return [] if self.feeds_tied(norm) else [part.name for part in self._heads(norm)]

    def feeds_tied(self, norm: Part) -> bool:
        """Whether what reads a norm's output shares its weight with the embeddings."""
        shared = shared_parameters(self.student)
        return any(id(part.student.weight) in shared for part in self._heads(norm))

    def _heads(self, norm: Part) -> list[Part]:
        """The output heads that read a norm."""
        assert isinstance(norm.rule, Norm)
        outside = [part for part in self.parts if part.block is None]
        return [part for part in outside if norm.block is None and part.inner in norm.rule.readers]


def _check_weights(module: nn.Module, rule: Rule, name: str) -> None:
    """UserError for parameters that are not floating-point numbers in this process's memory."""
    parameters = list(module.parameters(recurse=False))
    lacking = isinstance(rule, Linear) and not isinstance(getattr(module, "weight", None), nn.Parameter)
    if lacking or any(not p.is_floating_point() or p.itemsize == 1 for p in parameters):
        how = "load the model without quantization, and merge adapters"
        raise UserError(f"student_init='teacher': {name} has no floating-point weight: {how}")
    if any(p.is_meta or hasattr(p, "device_mesh") for p in parameters):
        raise UserError(f"student_init='teacher': {name} is offloaded or sharded: load the whole model on one device")


def shared_parameters(model: nn.Module) -> set[int]:
    """Parameters that have several names, by id."""
    names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {key for key, count in names.items() if count > 1}


def gain_of(norm: nn.Module, family: Family) -> torch.Tensor:
    """A norm's gain, (D,), float64 on the CPU."""
    weight: Any = norm.weight
    return weight.detach().cpu().double() + family.gain_offset


def bias_of(module: nn.Module) -> torch.Tensor | None:
    """A norm's or map's bias, float64 on the CPU; None without one."""
    bias: Any = getattr(module, "bias", None)
    return None if bias is None else bias.detach().cpu().double()


def normalized(hidden: torch.Tensor, norm: nn.Module, family: Family) -> torch.Tensor:
    """What `norm` makes of states (N, D) before its gain and bias."""
    eps: Any = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", 0.0)
    if not family.rms:
        hidden = hidden - hidden.mean(-1, keepdim=True)
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)


def block_pairs(student_blocks: int, teacher_blocks: int, pairs: Sequence[tuple[Any, Any]] = ()) -> list[int]:
    """The teacher's block for each of the student's: those of the layer map, and in proportion between them. Pairs of the
    uniform map, such as those of `num_stages`, leave all blocks as that map has them.

    Warns where several start from one. Raises UserError for a student that is deeper than its teacher, or a map to blocks
    that they do not have."""
    if student_blocks > teacher_blocks:
        found = f"the student has {student_blocks} blocks, the teacher {teacher_blocks}"
        raise UserError(
            f"{found}: student_init='teacher' needs a student that is not deeper; use student_init='random'"
        )
    check_places(pairs, student_blocks, teacher_blocks)
    given = {mine: theirs for mine, theirs in pairs if isinstance(mine, int) and isinstance(theirs, int)}
    uniform: dict[Any, Any] = dict(uniform_layer_map(student_blocks, teacher_blocks))
    if given.items() <= uniform.items():
        return list(uniform.values())
    known = {0: 0, student_blocks: teacher_blocks, **given}
    found_blocks = []
    for block in range(1, student_blocks + 1):
        below, above = max(p for p in known if p < block), min(p for p in known if p >= block)
        part = (block - below) / (above - below)
        found_blocks.append(max(1, round(known[below] + part * (known[above] - known[below]))))
    repeated = [f"{mine}:{theirs}" for mine, theirs in enumerate(found_blocks, 1) if found_blocks.count(theirs) > 1]
    if repeated:
        mapped = sorted({mine for mine, _ in pairs if isinstance(mine, int)})
        other = ",".join(f"{mine}:{round(mine * teacher_blocks / student_blocks)}" for mine in mapped)
        found = f"several blocks of the student start from one of the teacher (student:teacher {', '.join(repeated)})"
        why = "before, between or after the pairs of the layer map the student has more blocks than the teacher"
        # from one place, so that Python shows it once a run
        warnings.warn(f"{found}, since {why}: choose other pairs, e.g. layer_map={other}", UserWarning, stacklevel=1)
    return found_blocks
