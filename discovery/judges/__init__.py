"""Judging answers: refusal, coherence, toxicity, likeness, and how far judges agree with people."""
