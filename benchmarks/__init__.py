"""Speed, measured: not tests, and not part of the library."""
