"""Commands that run and operate a gateway: serve, doctor, config, keys, audit, transcripts."""
