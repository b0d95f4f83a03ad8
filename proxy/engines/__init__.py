"""The engines behind the gateway: starting, connecting, proving, watching and load balancing."""
