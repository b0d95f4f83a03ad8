"""The public app: from a request that was let in to the answer of the engine, or to a refusal."""
