"""PTX as text, read into instructions with their operands, and where labels stand among them."""

import re
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .faults import UnknownInstructionError

REGISTER_TYPES = {
    "pred": np.bool_,
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), np.uint16),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), np.uint32),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), np.uint64),
}
"""What registers hold: the bits, whatever instructions take them for."""


@dataclass(frozen=True)
class Instruction:
    """One instruction. parts: its name, split at the points; guard: a predicate's register, with "!" where negated."""

    text: str
    parts: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None = None
    scope: tuple[int, ...] = ()

    @property
    def name(self):
        return ".".join(self.parts)

    @property
    def type(self):
        """The last part: of most instructions the type of what they write."""
        return self.parts[-1]

    def has(self, *parts):
        return set(parts) <= set(self.parts)

    def __str__(self):
        return self.text


@dataclass
class Program:
    """A kernel's code. parameters: names in order; registers: each one's number and type, by name."""

    name: str
    parameters: list[str]
    threads: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, tuple[int, type]] = field(default_factory=dict)

    @cached_property
    def written(self):
        """Names of registers that some instruction writes."""
        found = set()
        for one in self.instructions:
            if one.operands and one.parts[0] not in ("st", "red", "stmatrix", "bra"):
                # The operand that is written comes first, and may be a pair or a tuple.
                found.update(re.findall(r"[^\s,|{}]+", one.operands[0]))
        return found

    def target(self, instruction):
        """The place that a branch goes to: the label of the innermost scope that has it."""
        label = instruction.operands[-1]
        for depth in range(len(instruction.scope), -1, -1):
            if (found := self.labels.get(_scoped(label, instruction.scope[:depth]))) is not None:
                return found
        raise UnknownInstructionError(f"no label {label}: {instruction}")


def read(text):
    """The only kernel of a module."""
    code = re.sub(r"//[^\n]*", "", text)
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", code, re.DOTALL)
    name, parameters, directives = head.groups()
    program = Program(
        name,
        re.findall(r"\b(\w+_param_\d+)", parameters),
        int(re.search(r"\.reqntid\s+(\d+)", directives)[1]),
    )
    body = re.sub(r"^\s*\.(?:loc|file)\b[^\n]*", "", code[head.end() :], flags=re.MULTILINE)
    scopes, opened, at = [0], 0, 0
    item = re.compile(r"\s*(?:(?P<brace>[{}])|(?P<label>[\w$]+):(?!:)|(?P<statement>[^;{}]+(?:\{[^}]*\}[^;{}]*)*);)")
    while len(scopes):
        found = item.match(body, at)
        at = found.end()
        if found["brace"] == "{":
            opened += 1
            scopes.append(opened)
        elif found["brace"] == "}":
            scopes.pop()
        elif found["label"]:
            program.labels[_scoped(found["label"], scopes[1:])] = len(program.instructions)
        else:
            _add_statement(program, " ".join(found["statement"].split()), tuple(scopes[1:]))
    return program


def _scoped(label, scope):
    return "/".join(map(str, (*scope, label)))


def _add_statement(program, text, scope):
    if text.startswith(".reg"):
        kind, names = re.match(r"\.reg \.(\w+) (.*)", text).groups()
        for name, count in re.findall(r"([%\w$]+)(?:<(\d+)>)?", names):
            for each in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                # A name that inner scopes declare again is used in one of them at a time.
                program.registers.setdefault(each, (len(program.registers), REGISTER_TYPES[kind]))
    elif not text.startswith("."):
        guard, opcode, rest = re.match(r"(?:@(!?[%\w]+) )?([\w.:]+) ?(.*)", text).groups()
        operands = re.findall(r"(?:\{[^}]*\}|\[(?:[^\[\]{}]|\{[^}]*\})*\]|[^,{}\[\]]+)+", rest)
        operands = tuple(operand.strip() for operand in operands)
        program.instructions.append(Instruction(text, tuple(opcode.split(".")), operands, guard, scope))
    elif not text.startswith(".pragma"):
        raise UnknownInstructionError(f"no meaning of {text}")


def members(operand):
    """The registers of {a, b, ...}, or the only one."""
    return [name.strip() for name in operand.strip("{} ").split(",")]


def address(operand):
    """(base, offset) of [base + offset]."""
    base, offset = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]", operand).groups()
    return base, int(offset or "0", 0)
