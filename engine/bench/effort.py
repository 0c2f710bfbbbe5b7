"""How long is measured."""

from dataclasses import dataclass

MOST_RUNS, MOST_SECONDS = 100_000, 86_400.0


@dataclass(frozen=True)
class Effort:
    """`runs` timed edits of each case, or as many as fit in `seconds`, spread over `rounds` of all cases.

    Every round visits every case once, in a new process: it loads the model, makes the first edit, `warmup` more, and
    then those that are timed. Raises OptionError.
    """

    runs: int = 15
    seconds: float | None = None  # of each case; replaces runs
    rounds: int = 3
    warmup: int = 1

    def __post_init__(self) -> None:
        from sdedit.checks import real, whole  # they load NumPy, which building a command line must not

        whole("runs", self.runs, 1, MOST_RUNS, hint="--runs 15")
        whole("rounds", self.rounds, 1, MOST_RUNS, hint="--rounds 3")
        whole("warmup", self.warmup, 0, MOST_RUNS, hint="--warmup 1")
        if self.seconds is not None:
            real("seconds", self.seconds, 0, MOST_SECONDS, with_low=False, hint="--seconds 10")

    @property
    def visits(self) -> list["Visit"]:
        """What each round does with each case."""
        if self.seconds is not None:
            return [Visit(1, self.seconds / self.rounds, self.warmup)] * self.rounds
        rounds = min(self.rounds, self.runs)
        fewest, more = divmod(self.runs, rounds)
        return [Visit(fewest + (number < more), 0.0, self.warmup) for number in range(rounds)]


@dataclass(frozen=True)
class Visit:
    """One process's share: at least `runs` timed edits, and more until `seconds` have passed."""

    runs: int
    seconds: float
    warmup: int
