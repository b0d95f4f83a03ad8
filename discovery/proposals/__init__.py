"""Makes a policy from a contrast, features or a circuit; measurements choose its strength and gate."""
