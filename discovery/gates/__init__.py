"""Learns when a policy should act: probes, gates, and the learned edit behind a gate."""
