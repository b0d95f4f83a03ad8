"""From a contrast, features or a circuit to a policy whose strength and gate were chosen by measurement."""
