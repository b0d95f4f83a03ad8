"""Judges answers: refusal, coherence, toxicity, similarity, and the judges' agreement with people."""
