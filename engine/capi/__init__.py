"""The noise and the step update for programs that call C: sdedit.h, and what builds the library behind it."""
