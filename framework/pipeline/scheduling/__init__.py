"""Which stage has which segments, and what it does in which order: pure functions, testable without processes."""
