"""Proposals for classes whose aim is `answer`: target prompts are answered as wanted, behind a gate."""
