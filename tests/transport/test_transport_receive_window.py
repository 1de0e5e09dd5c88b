"""The arithmetic of what a reader holds, against a model."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from transport.receive_window import ReceiveWindow


class WindowMachine(RuleBasedStateMachine):
    """``tail`` is the first sequence that was not released; it never goes back."""

    def __init__(self) -> None:
        super().__init__()
        self.window = ReceiveWindow(4)
        self.released = []
        self.before = 0

    @precondition(lambda self: not self.window.full)
    @rule()
    def take(self) -> None:
        assert self.window.take() == len(self.released)
        self.released.append(False)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        open_ones = [n for n, released in enumerate(self.released) if not released]
        if open_ones:
            sequence = data.draw(st.sampled_from(open_ones))
            self.released[sequence] = True
            moved = self.window.release(sequence)
            assert moved == (self.window.tail != self.before)

    @invariant()
    def tail(self) -> None:
        expected = self.released.index(False) if False in self.released else len(self.released)
        assert self.window.tail == expected >= self.before
        assert self.window.full == (len(self.released) - expected == 4)
        self.before = self.window.tail


TestWindow = WindowMachine.TestCase
TestWindow.settings = settings(max_examples=50, deadline=None)
