"""Guessing tokens ahead, so that one pass through the stages may yield several.

What followed the last few tokens when they stood in the text before is tried next ("prompt
lookup"). The stages compute the guesses behind the last token in one pass; the head chooses as
ever, row after row, and goes on with the next row as long as what it chose is what was guessed.
So nothing changes but the time, whatever way tokens are chosen.

What was not tried is looked back at: would it have come true? Only in a text in which it often
would guesses are tried, and only what measured faster goes on.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence

LONGEST_MATCH, SHORTEST_MATCH = 4, 2  # tokens that must stand there again
FEWEST, MOST = 2, 10  # guesses at a time
WARM_PASSES = 4  # without guesses, before the first ones
TRIES = 2  # at least, before it is judged
PATIENCE, MOST_PATIENCE = 32, 512  # passes without guesses after they did not pay
WINDOW = 8  # passes that are remembered
GAIN = 1.03  # times faster, to go on
LIKELY_GAIN, LOOKED_BACK = 1.75, 2  # tokens a pass that guesses would have had, so many times


class Lookup:
    """The text so far, and where its short runs of tokens stood last."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # a run: where what follows it begins
        self.add(tokens)

    def add(self, tokens: Sequence[int]) -> None:
        """More text."""
        for token in tokens:
            end = len(self._tokens)
            for length in range(SHORTEST_MATCH, min(LONGEST_MATCH, end) + 1):
                self._after[tuple(self._tokens[end - length :])] = end
            self._tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that followed the longest run that the text ends with."""
        for length in range(min(LONGEST_MATCH, len(self._tokens)), SHORTEST_MATCH - 1, -1):
            begin = self._after.get(tuple(self._tokens[-length:]))
            if begin is not None:
                return self._tokens[begin : begin + most]
        return []


class Pace:
    """Whether guesses pay: what passes took with them and without, and what they yielded."""

    def __init__(self) -> None:
        self._plain: deque[float] = deque(maxlen=WINDOW)
        self._guessing: deque[float] = deque(maxlen=WINDOW)
        self._gained: deque[int] = deque(maxlen=WINDOW)
        self._passes = self._tries = self._wait = 0
        self._patience = PATIENCE
        self._would_have: deque[int] = deque(maxlen=WINDOW)
        self.length = (FEWEST + MOST) // 2

    def most(self) -> int:
        """How many guesses the next pass shall have at most."""
        if self._wait or self._passes < WARM_PASSES or len(self._would_have) < LOOKED_BACK:
            return 0
        return self.length if statistics.mean(self._would_have) >= LIKELY_GAIN else 0

    def looked_back(self, gained: int) -> None:
        """A pass with guesses would have given so many tokens."""
        self._would_have.append(gained)

    def passed(self, guessed: int, gained: int, seconds: float) -> None:
        """A pass with so many guesses gave so many tokens."""
        if not guessed:
            self._passes += 1
            self._plain.append(seconds)
            self._wait = max(0, self._wait - 1)
            return
        self._guessing.append(seconds)
        self._gained.append(gained)
        self._would_have.append(gained)
        self._tries += 1
        if gained > guessed:
            self.length = min(MOST, self.length + 2)
        elif gained == 1:
            self.length = max(FEWEST, self.length - 2)
        if self._tries >= TRIES and not self._pays():
            self._wait, self._tries = self._patience, 0
            self._patience = min(MOST_PATIENCE, 2 * self._patience)
            self._guessing.clear()
            self._gained.clear()
        elif self._tries >= WINDOW:
            self._patience = PATIENCE

    def _pays(self) -> bool:
        tokens = statistics.mean(self._gained)
        return tokens * statistics.median(self._plain) > GAIN * statistics.median(self._guessing)


class Feed:
    """What stage 0 feeds into the pipeline for one sequence after its prompt."""

    def __init__(
        self,
        prompt: Sequence[int],
        most_tokens: int,
        *,
        guesses: bool,
        clock: Callable[[], float],
    ) -> None:
        self.text = list(prompt)  # and what was chosen since
        self._lookup = Lookup(prompt) if guesses else None
        self._pace, self._looked_at = Pace(), len(prompt)
        self._left = most_tokens
        self._guess: list[int] = []
        self._untried: tuple[int, list[int]] | None = None  # a guess, and where it would have stood
        self._clock = clock
        self._sent: float | None = None  # when a pass of this sequence alone began

    @property
    def past(self) -> int:
        """The position of what is fed next: of the last token that was chosen."""
        return len(self.text) - 1

    def take(self, tokens: Sequence[int]) -> None:
        """These were chosen after the prompt, or after what was fed last."""
        self._left -= len(tokens)
        self.text += tokens
        if self._sent is not None:
            self._pace.passed(len(self._guess), len(tokens), self._clock() - self._sent)

    def next(self, *, alone: bool) -> list[int]:
        """The last token; with guesses behind it where no other sequence is computed with it."""
        self._guess, self._sent = [], None
        if alone and self._lookup is not None:
            most = min(self._pace.most(), self._left - 1)
            if most > 0:
                self.catch_up()
                self._guess = self._lookup.guess(most)
            if self._guess:
                self._untried = None
            self._sent = self._clock()
        return [self.text[-1], *self._guess]

    def catch_up(self) -> None:
        """Look at the newest tokens: while others compute, where nothing has to be guessed now."""
        if self._lookup is None:
            return
        self._lookup.add(self.text[self._looked_at :])
        self._looked_at = len(self.text)
        self._look_back()
        if self._untried is None and not self._guess:
            self._untried = len(self.text), self._lookup.guess(self._pace.length)

    def _look_back(self) -> None:
        """Whether an untried guess would have come true, as soon as that is known."""
        if self._untried is None:
            return
        start, guess = self._untried
        came = self.text[start:]
        right = next((i for i, (a, b) in enumerate(zip(guess, came, strict=False)) if a != b), -1)
        if right < 0 and len(came) < len(guess):
            return
        if guess:
            self._pace.looked_back(1 + (len(guess) if right < 0 else right))
        self._untried = None
