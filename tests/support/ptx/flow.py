"""The places at which threads that take different branches meet again."""

from functools import lru_cache


class Flow:
    """The branches of a program."""

    def __init__(self, program):
        self._program = program
        self._count = len(program.instructions)
        self.meeting_place = lru_cache(maxsize=None)(self._meeting_place)

    def _meeting_place(self, at):
        """The first instruction that both ways of the branch must come to; the end if there is none before."""
        unavoidable = self._unavoidable
        both = unavoidable[self._next[at][0]]
        for place in self._next[at][1:]:
            both &= unavoidable[place]
        # Of these the first is the one from which all others are still to come.
        places = [place for place in range(self._count + 1) if both >> place & 1]
        return max(places, key=lambda place: bin(unavoidable[place]).count("1"))

    @property
    def _unavoidable(self):
        """The postdominators of each instruction, as bits: those that are run after it in any case, and itself."""
        if not hasattr(self, "_found"):
            self._next = [self._successors(at) for at in range(self._count)]
            everything = (1 << (self._count + 1)) - 1
            found = [everything] * self._count + [1 << self._count]
            changed = True
            while changed:
                changed = False
                for at in reversed(range(self._count)):
                    common = everything
                    for place in self._next[at]:
                        common &= found[place]
                    common |= 1 << at
                    changed |= common != found[at]
                    found[at] = common
            self._found = found
        return self._found

    def _successors(self, at):
        one = self._program.instructions[at]
        if one.parts[0] in ("ret", "exit"):
            return [self._count]
        if one.parts[0] == "bra":
            return [self._program.target(one)] + ([at + 1] if one.guard else [])
        return [at + 1]
