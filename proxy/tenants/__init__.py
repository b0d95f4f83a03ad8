"""Who is calling, what they may use, and what they are charged."""
