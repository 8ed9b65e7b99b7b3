"""Who owns which segments, and what each stage does when: pure functions."""
