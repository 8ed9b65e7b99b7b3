"""The training loop, how a run resumes, the results that it writes, and fine-tuning."""
