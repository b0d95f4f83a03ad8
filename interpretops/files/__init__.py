"""Reading and writing files strictly: whole or not at all, bounded, and with errors that name the place."""
