"""What the machine reports of a program that does what a GPU would not, or must not, do."""


class FaultError(Exception):
    """An access out of bounds or misaligned, a register without a value, a wait that never ends."""


class UnknownInstructionError(NotImplementedError):
    """An instruction, or a form of one, that the machine has no meaning of."""
